"""What `--help` says: every command with examples that can be copied. Imports nothing."""

MAIN = """\
jaxpost turns a pretrained language model and data into a better model.

 1. see what it would train on    jaxpost data inspect configs/grpo/demo.yaml
 2. train with your changes      jaxpost train configs/grpo/demo.yaml --train.steps 20
 3. ask the result                jaxpost generate runs/demo/export "What is 17 + 25? Answer with a number." --system ''
 4. get more at test time         jaxpost search configs/search/self_consistency.yaml
"""

MAIN_EPILOG = """\
`jaxpost COMMAND --help` explains a command. `jaxpost train PRESET --help` lists every setting with its value.
Exit codes: 0 done, 1 the run failed, 2 something in the command or preset is wrong, 130/143 stopped by a signal
(what was reached is saved; the same command goes on from there).
"""

TRAIN = """\
Train as a preset says. Any key of the preset is a flag; what is given here wins over the file.
The run's folder (run.dir) holds the resolved configuration, metrics.jsonl, samples, checkpoints and the exported
model. The same command run again goes on from the last checkpoint.
"""

TRAIN_EPILOG = """\
examples:
  jaxpost train configs/grpo/demo.yaml
  jaxpost train configs/grpo/demo.yaml --advantage.kind rloo --prompts.operations "+" --run.name sums
  jaxpost train configs/sft/gsm8k.yaml --data.train.0.path train.jsonl.gz --optim.lr 1e-6
  jaxpost train configs/sft/gsm8k.yaml --adapter '{kind: lora, rank: 8}' --run.name gsm8k-lora8
  jaxpost train configs/dpo/local_dpo.yaml --losses '[{kind: ipo, beta: 0.1}]' --data.train.0.path pairs.jsonl
  jaxpost train configs/sft/gsm8k.yaml --optim.kind lion --optim.lr 3e-6 --train.steps 200
  jaxpost train configs/sft/gsm8k.yaml --help          every flag, its meaning and its value in that preset
  jaxpost train runs/demo/config.yaml --run.name again an earlier run's configuration is a preset too

flags:
  --section.key VALUE        a word, or several for a list: --adapter.trainable "*norm*" "*bias*"
  --section.kind NAME        another kind of section; settings that both kinds have are kept
  --data.train.0.path FILE   item 0 of a list; the number after the last item adds one
  --section '{key: value}'   a whole section or list, in YAML
"""

GENERATE = """\
Answer prompts with a model: a local folder (such as a run's export), a hub id, or smollm2-135m-instruct.
Each prompt is one user turn in the model's chat format; --raw continues the text as it stands.
"""

GENERATE_EPILOG = """\
examples:
  jaxpost generate smollm2-135m-instruct "What is the capital of France?"
  jaxpost generate runs/demo/export "Tell me a story." --temperature 0.8 --seed 1 --max-tokens 200
  jaxpost generate smollm2-135m-instruct --raw "The first ten primes are"
  jaxpost generate runs/demo/export --file prompts.jsonl --out answers.jsonl --set n=4 --set top_p=0.9
  jaxpost generate smollm2-135m-instruct "Is water wet?" --choice yes --choice no
  jaxpost generate smollm2-135m-instruct "Name three colours." --set num_beams=4 --set length_penalty=0.8
  jaxpost generate smollm2-135m-instruct "Hello" --server http://localhost:8000/v1 --policy-version 3
  jaxpost generate - --file prompts.jsonl --out answers.jsonl --server http://localhost:8000/v1 --server-model big

Interrupted, the same command with --out goes on where it stopped. Names of --set: n, top_k, top_p, min_p, stop,
stop_token_ids, min_tokens, repetition_penalty, presence_penalty, frequency_penalty, no_repeat_ngram_size, logit_bias,
allowed_token_ids, bad_words, ignore_eos, logprobs, prompt_logprobs (vLLM's; OpenAI's and Hugging Face's are known too);
num_beams, length_penalty and early_stopping (true, false, never) search for the most probable answers instead.
"""

CHAT = """\
Talk with a model. Answers are written as they are drawn, and the conversation is kept.
"""

CHAT_EPILOG = """\
examples:
  jaxpost chat smollm2-135m-instruct
  jaxpost chat runs/demo/export --system "You are chatting with a friend." --set top_p=0.9
  jaxpost chat runs/demo/export --think-min 20 --think-max 200
"""

CONVERT = """\
Write a model as a Hugging Face folder (config.json, safetensors, tokenizer): from a GGUF file, a hub id, another
Hugging Face folder, or a LoRA adapter folder, which is merged into its base.
"""

CONVERT_EPILOG = """\
examples:
  jaxpost convert model.gguf model-hf
  jaxpost convert smollm2-135m-instruct smollm2 --dtype bfloat16
"""

INSPECT = """\
Show what a preset would train on, before it trains: rows as the model will read them with the trained tokens
coloured, a histogram of lengths, and counts of truncated and dropped rows. Of reinforcement learning: problems as
the model sees them, and what each reward says of the reference answers. Of preferences: both sides and what differs.
"""

INSPECT_EPILOG = """\
examples:
  jaxpost data inspect configs/sft/chitchat.yaml
  jaxpost data inspect configs/grpo/demo.yaml
  jaxpost data inspect configs/dpo/local_dpo.yaml --data.train.0.path pairs.jsonl --data.eval '[]'
  jaxpost data inspect configs/sft/gsm8k.yaml --rows 10 --data.train.0.path mine.jsonl
"""

REPORT = """\
Write a run as one self-contained page: what changed with intervals, curves, alarms, and a browser of samples. It works
on a run that is still going on, and shows several runs together.
"""

REPORT_EPILOG = """\
examples:
  jaxpost report runs/demo
  jaxpost report runs/a runs/b runs/c --out comparison.html
  jaxpost report runs/best_of_n                       a search: answers and trees
"""

SHOW = "Print every setting of a preset, defaults included, as YAML that is itself a preset."

SHOW_EPILOG = """\
examples:
  jaxpost config show configs/sft/chitchat.yaml
  jaxpost config show configs/sft/chitchat.yaml --optim.kind lion > mine.yaml
"""

DIFF = "Print the settings in which two presets differ, defaults included; flags apply to the second."

DIFF_EPILOG = """\
examples:
  jaxpost config diff configs/sft/gsm8k.yaml configs/sft/gsm8k_lora.yaml
  jaxpost config diff configs/sft/chitchat.yaml runs/demo/config.yaml
"""

ENV = "Print what jaxpost runs on: versions, devices, memory, caches. Worth a line in every report of a problem."

ENV_EPILOG = """\
examples:
  jaxpost env
  jaxpost env --json
"""
