"""Answers compared with a table made by hand, hostile text among it."""

import gzip
import json
import math
import re
import time
from fractions import Fraction

import pytest

from jaxpost.rewards.answers import MathAnswer, MultipleChoice, boxes, final_answer
from jaxpost.rewards.contract import Sample
from jaxpost.rewards.exact import Beyond, Exact
from jaxpost.rewards.latex import equal, read

SAME = [
    ("42", "42"),
    ("42", "42."),
    ("42", "42.0"),
    ("42", "$42$"),
    ("42", "\\$42.00"),
    ("1234567", "1,234,567"),
    ("1234", "1{,}234"),
    ("1234", "1\\,234"),
    ("10080", "10,\\!080"),
    ("\\$32,\\!348", "32348"),
    ("11111111100", "11,\\! 111,\\! 111,\\! 100"),
    ("10000", "10\u202f000"),
    ("-3", "−3"),
    ("0.5", ".5"),
    ("0.5", "1/2"),
    ("0.5", "\\frac12"),
    ("0.5", "\\dfrac{1}{2}"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("\\frac{1}{3}", "2/6"),
    ("1.5", "1\\frac{1}{2}"),
    ("1.5", "1 1/2"),
    ("-1.5", "-1\\frac12"),
    ("0.5", "50%"),
    ("50\\%", "50"),
    ("50", "50 percent"),
    ("12.5%", "0.125"),
    ("5", "5 meters"),
    ("5 cm", "5\\text{ centimeters}"),
    ("5 m", "5 meters"),
    ("12", "12 square inches"),
    ("90", "90^\\circ"),
    ("90°", "90"),
    ("18", "$18 per day"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
    ("\\frac{1}{\\sqrt{3}-1}", "\\frac{1+\\sqrt{3}}{2}"),
    ("3^{1/2}", "√3"),
    ("2\\pi", "2π"),
    ("\\frac{\\pi}{4}", "0.25\\pi"),
    ("x^2+2x+1", "(x+1)^2"),
    ("2xy", "2yx"),
    ("5", "x = 5"),
    ("(1,2)", "\\left( 1, 2 \\right)"),
    ("(100,101)", "\\left(\\frac{200}{2}, 101\\right)"),
    ("[0, 100)", "x \\in [0,10^2)"),
    ("(1,2,300)", "(1, 2, 3 \\cdot 100)"),
    ("\\{1,100\\}", "\\{100,1\\}"),
    ("(1,000, 2,500)", "(1000, 2500)"),
    ("(1,000)", "1000"),
    ("1,2", "2, 1"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("[0,1)", "x \\in [0, 1)"),
    ("(-\\infty, 3]", "(-\\infty,3]"),
    ("1000000", "10^6"),
    ("2^{10}", "1024"),
    ("6 \\cdot 7", "42"),
    ("6 \\times 10^{-2}", "0.06"),
    ("Friday", "\\text{friday}"),
    ("\\text{(B)}", "(B)"),
    ("120", "12 \\times 10"),
    ("1200000", "1.2e6"),
    ("6.02 \\times 10^{23}", "6.02E+23"),
    ("0.00012", "1.2e-4"),
    ("1000000", "1 000 000"),
    ("2", "\\sqrt[3]{8}"),
    ("-\\frac{2}{3}", "\\sqrt[3]{-\\frac{8}{27}}"),
    ("1,2", "1\\text{ and }2"),
    ("\\{1,2,3\\}", "1, 2, and 3"),
    ("1/3", "0.\\overline{3}"),
    ("-\\frac{7}{6}", "-1.1\\overline{6}"),
    ("3,-3", "\\pm 3"),
    ("3,4", "x = 4 \\text{ or } x=3"),
    ("1 \\pm \\sqrt{2}", "1-\\sqrt2, 1+\\sqrt2"),
    ("\\pm2", "±2"),
    ("1 \\le x \\le 2", "1\\leq x\\leq2"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("5", "5\\ \\text{units}"),
    ("72", "\\text{72 clips}"),
    ("0.5", "½"),
    ("3.5", "3½ cups"),
    ("3.5", "3 1\u20442"),
    ("x^2", "x²"),
    ("4 cm^2", "4 cm²"),
    ("5 m^3", "5\\text{ m}³"),
    ("4 \\text{ m}^2", "4\\text{ m^2}"),
    ("125\\textnormal{ miles}", "125"),
    ("164 \\pi \\mbox{ square feet}", "164\\pi"),
    ("4343_6", "4343_{6}"),
    ("2^x", "2^{x}"),
    ("2, 3, \\text{ and } 4", "4, 3, 2"),
]
DIFFERENT = [
    ("42", "43"),
    ("42", "4 2"),
    ("0.333", "1/3"),
    ("3.14", "\\pi"),
    ("0.5", "0.5%"),
    ("5 cm", "5 m"),
    ("5 cm", "5 cm^2"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "1,2"),
    ("(1,100)", "1100"),
    ("[0,100]", "100"),
    ("\\{1,2\\}", "\\{1,2,3\\}"),
    ("2\\sqrt{3}", "3\\sqrt{2}"),
    ("x+1", "x-1"),
    ("x", "y"),
    ("Friday", "Fridya"),
    ("42", ""),
    ("42", "\u0664\u0662"),
    ("42", "\uff14\uff12"),
    ("52", "5\u00b2"),
    ("3", "3½"),
    ("312", "3½"),
    ("5", "5\\text{²}"),
    ("42", "forty-two"),
    ("1", "1/0"),
    ("387420489", "9**9"),
    ("1", '__import__("os").getpid()'),
    ("42", "0x2a"),
    ("0", "\\sqrt{-1}"),
    ("1234", "12,34"),
    ("1", "1e5"),
    ("2", "1e999999999"),
    ("12", "1 2"),
    ("12", "1  2"),
    ("12", "1\\,2"),
    ("12", "1\\quad 2"),
    ("12", "1\\text{2}"),
    ("56", "5$6"),
    ("100", "1 00"),
    ("3", "\\pm 3"),
    ("3,4", "x=3, y=4"),
    ("2", "\\sqrt[3]{9}"),
    ("2", "\\sqrt[4]{-16}"),
    ("0.3", "0.\\overline{3}"),
    ("\\begin{pmatrix}12\\\\3\\end{pmatrix}", "\\begin{pmatrix}1\\\\23\\end{pmatrix}"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_same(gold, answer):
    assert equal(gold, answer)
    assert equal(gold, gold)
    assert equal(answer, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold, answer):
    assert not equal(gold, answer)
    assert not equal(answer, gold)


HOSTILE = [
    '__import__("os").system("touch /tmp/never")',
    "9**9**9**9",
    "9^9^9^9",
    "9^{9^{9^{9}}}",
    "2^{1000000000}",
    "(1+x)^{1000}",
    "(" * 10**6 + "1" + ")" * 10**6,
    "(" * 250 + "1" + ")" * 250,
    "\\frac" * 100,
    "\\sqrt" * 100 + "2",
    "-" * 500 + "1",
    "{" * 300,
    "\\boxed{" * 200,
    "1," * 250 + "1",
    "1/3" * 150,
    "\\frac{1}{0}",
    "x^{-1}" * 80,
    "9" * 500,
    "\\sqrt{" + "9" * 150 + "}",
    "\\sqrt[3]{" + "9" * 150 + "}",
    "\\sqrt[9^9^9]{5}",
    "\\pm" * 150 + "5",
    "0.\\overline{" + "9" * 400,
    "5e" * 200,
    "1e999^999",
    "\\boxed{" * 99 + "5" + "}" * 98,
    "\\text{" * 80,
    "[" * 400,
    "\x00\ud800\U0010ffff",
    "1\\frac" * 80,
    "(\\sqrt2+\\sqrt3+\\sqrt5+\\sqrt7+\\sqrt{11}+\\sqrt{13})^{900}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_wrong_quickly(text):
    start = time.perf_counter()
    assert not equal("7", text)
    reward = MathAnswer()
    for around in ("{}", "\\boxed{{{}}}", "#### {}", "The answer is {}"):
        assert reward([{"answer": "7"}], [Sample(around.format(text))])["math"] == [0]
    assert time.perf_counter() - start < 2


def test_long_hostile_texts_are_read_in_linear_time():
    start = time.perf_counter()
    pieces = ("\\boxed{", "answer: ", "answer is ", "$1,", "#", "- ", "answer \n", "(A", "1/", "{", "}", "1,111")
    for piece in (*pieces, "1 ", "1 / ", "n't ", "1 or ", "1²"):
        text = piece * (10**6 // len(piece))
        final_answer(text)
        MultipleChoice().choice(text)
    assert time.perf_counter() - start < 5


def test_exact_values_agree_with_floats():
    """Random expressions of roots and pi, against floating point."""
    import random

    draw = random.Random(0)
    for _ in range(200):
        value, number = Exact.of(0), 0.0
        for _ in range(3):
            q, n, power = Fraction(draw.randint(-9, 9), draw.randint(1, 9)), draw.randint(1, 400), draw.randint(0, 2)
            part, size = Exact.of(q) * Exact.of(n).root(), float(q) * math.sqrt(n)
            part, size = part * Exact.letter("pi").power(Fraction(power)), size * math.pi**power
            if draw.random() < 0.5:
                value, number = value + part, number + size
            else:
                value, number = value * part + Exact.of(1), number * size + 1
        assert float(value) == pytest.approx(number, rel=1e-9, abs=1e-9)
        assert value - value == Exact.of(0)
    for n in range(1, 500):
        root = Exact.of(n).root()
        assert root * root == Exact.of(n)
        assert (root.rational is not None) == (math.isqrt(n) ** 2 == n)
        if root.rational is None:
            assert float(Exact.of(1) / (root + Exact.of(30))) == pytest.approx(1 / (math.sqrt(n) + 30))


def test_values_beyond_the_limits_are_refused():
    with pytest.raises(Beyond, match="bits"):
        Exact.of(10).power(Fraction(1024)).power(Fraction(10))
    with pytest.raises(Beyond, match="exponent"):
        Exact.of(2).power(Fraction(10**6))
    with pytest.raises(Beyond, match="division"):
        Exact.of(1) / Exact.of(0)
    with pytest.raises(Beyond, match="root"):
        Exact.of(-1).root()
    assert read("9^9^9^9").values == ()


def test_a_tolerance_is_relative():
    assert equal("3.14", "\\pi", tolerance=1e-3)
    assert not equal("3.14", "\\pi", tolerance=1e-4)
    assert equal("0.333", "1/3", tolerance=0.01)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{42}.", "42"),
        ("\\boxed{1} no, \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\fbox{7}", "7"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{x = \\boxed{7}}", "x = \\boxed{7}"),
        ("\u7b54\u6848\u662f12\u3002", "12"),
        ("it is 6.02e23.", "6.02e23"),
        ("it is 1e999999999", "1e999999999"),
        ("10\\% of it", "10\\%"),
        ("\\boxed{3 and then \\boxed{4}", "4"),
        ("2+2=4\n#### 4\n", "4"),
        ("#### 3\n#### 4 apples\nbye", "4 apples"),
        ("The answer is 5.", "5"),
        ("The answer is $5.50. Good.", "$5.50"),
        ("**Answer:** 1,200 dollars", "1,200 dollars"),
        ("the answer is that she has 5 apples and 3 pears", "5"),
        ("The final answer is: $\\frac{1}{2}$. I hope", "$\\frac{1}{2}$"),
        ("She has 3 + 4 = 7 apples", "7"),
        ("from 10-3 we get", "3"),
        ("it is -3", "-3"),
        ("it costs $1,234.50!", "$1,234.50"),
        ("it is 3/4 of it", "3/4"),
        ("50% of it", "50%"),
        ("no number", None),
        ("", None),
        ("\u0664\u0662", None),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


def test_sources_are_kept_to():
    assert final_answer("\\boxed{1} #### 2", sources=("hash",)) == "2"
    assert final_answer("The answer is 3", sources=("boxed", "hash")) is None
    assert boxes("\\boxed{a} } { \\boxed{b}") == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>1</think> <answer> 42 </answer> 7", "42"),
        ("<answer>1</answer> no <answer>2</answer>", "2"),
        ("<answer>so \\boxed{3} then</answer>", "3"),
        ("<answer> <answer>4</answer>", "4"),
        ("<answer>5", None),
        ("6</answer>", None),
        ("<answer> </answer>", None),
        ("<answer>" * 10**5, None),
    ],
)
def test_answers_between_tags(text, answer):
    assert final_answer(text, sources=("tag",)) == answer


def test_a_flood_of_boxes_is_read_in_one_pass():
    assert boxes("\\boxed{" * 10**5) == []


def test_references_of_all_kinds():
    reward, right = MathAnswer(key="target"), Sample("\\boxed{72}")
    golds = [72, 72.0, "72", "sold 48+24 = 72\n#### 72", "thus \\boxed{72}", ["71", "72"]]
    assert reward([{"target": gold} for gold in golds], [right] * 6)["math"].tolist() == [1.0] * 6
    assert reward([{"target": 71}], [right])["math"].tolist() == [0.0]
    with pytest.raises(ValueError, match=r"'math' needs 'target' in each example; this one has \['answer'\]"):
        reward([{"answer": 1}], [right])
    with pytest.raises(ValueError, match="2 examples for 1 completions"):
        reward([{"target": 1}] * 2, [right])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("b.", "B"),
        ("The answer is (C).", "C"),
        ("Answer: D) 15 apples", "D"),
        ("answer is option A", "A"),
        ("\\boxed{\\text{(E)}}", "E"),
        ("\\boxed{\\mathbf{B}}", "B"),
        ("\\boxed{\\text{Option B}}", "B"),
        ("\\boxed{B \\quad 12}", "B"),
        ("<answer>Option B</answer>", "B"),
        ("So the correct option is B.", "B"),
        ("Answer: [B]", "B"),
        ("not (A), so (B)", "B"),
        ("The answer is Blue", None),
        ("the answer is a bird", None),
        ("the answer is a", "A"),
        ("the answer is (a) bird", "A"),
        ("The answer is **(C)**", "C"),
        ("Answer\uff1aB", "B"),
        ("**B**", "B"),
        ("B) 12", "B"),
        ("A) 11\nB) 12", None),
        ("the answer is (A)? <answer>B</answer>", "B"),
        ("A dog", None),
        ("F", None),
        ("", None),
    ],
)
def test_choices(text, letter):
    assert MultipleChoice().choice(text) == letter


def test_choice_references():
    reward = MultipleChoice()
    assert reward([{"answer": a} for a in ("B", "(b)", 1, "A", 0)], [Sample("B")] * 5)["choice"].tolist() == [
        1,
        1,
        1,
        0,
        0,
    ]
    with pytest.raises(ValueError, match="none of the choices ABCDE"):
        reward([{"answer": "blue"}], [Sample("B")])


def rows(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_every_gsm8k_solution_is_right_and_its_neighbour_wrong(shared_data):
    data = rows(shared_data / "gsm8k" / "train.jsonl.gz") + rows(shared_data / "gsm8k" / "test_first_half.jsonl.gz")
    assert len(data) == 7473 + 660
    samples = [Sample(row["answer"]) for row in data]
    reward = MathAnswer()
    assert reward(data[::50], samples[::50])["math"].min() == 1
    answers = [row["answer"].split("####")[1].replace(",", "").strip() for row in data]
    assert reward([{"answer": answer} for answer in answers], samples)["math"].min() == 1
    assert reward([{"answer": float(answer) + 1} for answer in answers[::20]], samples[::20])["math"].max() == 0


def test_every_solution_of_math_is_right(shared_data):
    """Each solution's box against the data's own column of answers; the next row's is another answer."""
    data = rows(shared_data / "rl_math" / "math500_even.jsonl.gz")
    reward = MathAnswer(sources=("boxed",))
    samples = [Sample(row["solution"]) for row in data]
    assert len(data) == 250
    assert reward(data, samples)["math"].min() == 1
    assert reward(data[1:] + data[:1], samples)["math"].mean() < 0.05


def test_answers_with_units_in_parentheses(shared_data):
    data = [row["answer"] for row in rows(shared_data / "rl_math" / "asdiv.jsonl.gz")]
    named = [answer for answer in data if re.fullmatch(r"[0-9.]+ \([a-z ]+\)", answer)]
    assert len(named) > 1000
    assert all(equal(answer, answer.split()[0]) for answer in named)
    assert not any(equal(answer, f"{float(answer.split()[0]) + 1}") for answer in named)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5000000", "5 \\text{ million dollars}"),
        ("$1.5 million", "1500000"),
        ("500000", "5 hundred thousand"),
        ("-2", "\u20112"),
        ("-2", "\uff0d2"),
        ("8", "5 + 3 = 8"),
        ("8", "5+3=8 apples"),
        ("300", "\u00a5300"),
        ("2" * 600, "2" * 600),
    ],
)
def test_what_is_said_in_words_or_other_signs_is_the_same(gold, answer):
    assert equal(gold, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "5 million", "5 \\text{ thousand}", "5 squared", "5\\text{ factorial}", "5 over two", "5 plus one", "5 or six",
        "5\\text{ or six}", "5 times three", "5 maybe", "5\\text{ is wrong}", "5 sin x", "5 log x", "5 thirds",
        "5\\mathrm{i}", "5\\mathrm{e}", "5\\text{x}", "5\\text{-6}", "5\\text{/6}", "5\\text{.6}", "5\\text{,6}",
        "5\\text{!}", "5\\text{^4}", "5\\text{π}", "5 to the power of itself", "5 quadrillion", "5 root of x",
        "5 dollars and fifty cents", "5 + 3 = 5", "5 = x + 1", "5=" * 50 + "5",
    ],
)  # fmt: skip
def test_words_that_change_a_number_are_no_unit(answer):
    assert not equal("5", answer)


def test_long_answers_differ_wherever_they_differ():
    assert not equal("1" * 600, "1" * 599 + "2")
    assert not equal("1" * 600, "1" * 601)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\\boxed{5}</think> The answer is 7.", "7"),
        ("<think>I guess \\boxed{5}", None),
        ("<think>\\boxed{5}</think>", None),
        ("\\boxed{5}</think>\n#### 6", "6"),
        ("The answer is either 3 or 4.", "either 3 or 4"),
        ("The answer is not 5, but 7", "not 5, but 7"),
        ("The answer is between 3 and 4", "between 3 and 4"),
        ("The answer is more than $5$.", "more than $5$"),
        ("It is either 4 or 5", "It is either 4 or 5"),
        ("It is 4 or 5.", "It is 4 or 5"),
        ("We get $30 + $160 or $190", "$190"),
        ("That is a share of 3 / 5 = 0.60 or 60%", "60%"),
        ("100/5 = 5A/5 or 20 = A", "20"),
        ("So it is not 6.", "So it is not 6"),
        ("It is not hard: 6", "6"),
        ("It is 1, or 2. So 3", "3"),
        ("The answer isn't 6.", "n't 6"),
        ("The answer is one of 5, 6, 7", "one of 5, 6, 7"),
        ("The answer is > 5 apples", "> 5 apples"),
        ("The answer is $\\neq 5$ then", "\\neq 5"),
        ("The answer is <b>5</b>", "5"),
        ("The answer is -> 5", "5"),
        ("The answer is 5 less than 7", "5 less than 7"),
        ("The answer is 5 to 7", "5 to 7"),
        ("The answer is 5 and a half", "5 and a half"),
        ("The answer is 3, no wait, 4", "3, no wait, 4"),
        ("The answer is 5 times 3", "5 times 3"),
        ("The answer is 5 + 3 = 8 apples.", "5 + 3 = 8 apples"),
        ("It is \u22123", "\u22123"),
        ("It is 1 000 000 in all", "1 000 000"),
        ("It is 1\u202f000\u202f000.", "1\u202f000\u202f000"),
        ("It is $\\frac{1}{2}$.", "\\frac{1}{2}"),
        ("So it is 2^10.", "2^10"),
        ("It is 2 1/2 cups", "2 1/2"),
        ("It is 1 / 3 of it", "1 / 3"),
        ("It is 3½ cups", "3½"),
        ("It is √3.", "√3"),
        ("It is 3²!", "3²"),
        ("It is 1\u20442", "1\u20442"),
        ("It is 3\uff10", "3\uff10"),
        ("#### **6**", "6"),
        ("The answer is:\n\n\\[\n20\n\\]\nGood.", "20"),
        ("The answer is: $$\n20 + 1\n$$", "20 + 1"),
        ("The answer is: $$12^{1/7}$$", "12^{1/7}"),
        ("The answer is: $$5$$ or $$6$$", "$$5$$ or $$6$$"),
        ("12,5 litres", "12,5"),
        ("It is 5 million", "5 million"),
        ("The answer is that the least common multiple of them is 12", "12"),
        ("The answer is the difference between them, 5", "5"),
        ("The answer is 3:30 p.m.", "3:30 p.m"),
        ("The ratio's answer is 3 : 4 then", "3 : 4 then"),
        ("The answer is 5: 3 apples and 2 pears", "5"),
        ("The answer is (1,2) \\cup (3,4).", "(1,2) \\cup (3,4)"),
        ("The answer is the interval [1, 2) here.", "[1, 2)"),
        ("The answer is 5 (3 apples, 2 pears).", "5"),
    ],
)
def test_guesses_and_hedges_are_no_answers_and_formulas_stay_whole(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("3", "It is \u22123"),
        ("0", "1 000 000"),
        ("2", "$\\frac{1}{2}$"),
        ("10", "2^10"),
        ("1/2", "It is 2 1/2"),
        ("3", "It is 1 / 3"),
        ("3", "It is 3½"),
        ("12", "12,5"),
        ("5", "5 million"),
    ],
)
def test_a_part_of_a_number_is_not_the_number(gold, text):
    assert MathAnswer()([{"answer": gold}], [Sample(text)])["math"] == [0]


def test_a_choice_is_not_read_from_the_thinking():
    assert MultipleChoice().choice("<think>The answer is (A)?</think> The answer is (B).") == "B"
    assert MultipleChoice().choice("<think>The answer is (A)") is None


@pytest.mark.parametrize(
    "text",
    [
        "The answer is (A) or (B)", "The answer is A or B.", "The answer is A, B or C", "The answer is A/B",
        "The answer is (A)(B)(C)", "answer: A B C D", "\\boxed{A,B}", "\\boxed{A/B}", "\\boxed{A) and B)}",
        "\\boxed{A\\,B\\,C}", "\\boxed{A \\quad B}", "\\boxed{A\\lor B}", "answer: A through D", "\\boxed{A\\ B}",
        "(A) (B) (C) (D)", "I choose (A) or (B)", "**Answer: A** / **B**",
    ],
)  # fmt: skip
def test_several_letters_are_no_choice(text):
    assert MultipleChoice().choice(text) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (A), because (B) is wrong", "A"),
        ("The answer is B: a cat", "B"),
        ("The answer is option B because A is a bird", "B"),
        ("The answer is (A), that is (A)", "A"),
        ("(A) is wrong, (B) is right", "B"),
        ("\\boxed{A: 5}", "A"),
    ],
)
def test_a_letter_with_its_reasons_is_a_choice(text, letter):
    assert MultipleChoice().choice(text) == letter
