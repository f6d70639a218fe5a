"""One call of the sampler: a queue of samples, prompts that wait for theirs, and rows that decode together.

Rows that end are replaced between chunks; where the cache is full, the last row waits and starts again where it was.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxpost.generate.engine import Engine, Weights
from jaxpost.generate.layout import Text, bucket, smaller
from jaxpost.generate.matcher import Matcher, masks
from jaxpost.generate.pages import OutOfPages
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.programs import Best, Decoded, Scores
from jaxpost.generate.rows import GREEDY_BELOW
from jaxpost.generate.samples import Completion, Finish, Sample, Table, why_stuck
from jaxpost.generate.speculative import Lookup
from jaxpost.text.stop import first_stop

_NO_ROOM = "a single row does not fit the cache: raise cache_tokens"


class Room(NamedTuple):
    """What a caller that keeps texts between calls shares with them.

    Attributes:
        spare: gives back pages of a part that the caller holds for later; whether it did.
        halts: words of bits, by stop strings: tokens that have completed one of them. Rows that draw one pause.
    """

    spare: Callable[[int], bool]
    halts: dict[tuple[str, ...], np.ndarray]


class Run:
    """One call: a queue, prompts that wait for their samples, and rows that decode."""

    def __init__(
        self,
        engine: Engine,
        weights: Weights,
        samples: Sequence[Sample],
        table: Table,
        *,
        rows: int,
        decode: Callable[[Sequence[int]], str] | None,
        policy_version: int,
        lookup: Lookup | None = None,
        room: Room | None = None,
    ):
        self.room = room
        self.engine, self.weights, self.table, self.rows = engine, weights, table, rows
        self.decode = decode or (lambda tokens: "")
        self.queue, self.version, self.lookup = deque(samples), policy_version, lookup
        self.live: list[Sample] = []
        self.quota = -(-min(rows, len(samples)) // engine.shards)
        self.prompts: dict[tuple[int, tuple[int, ...]], Text] = {}
        self.scores: dict[tuple[int, ...], Scores] = {}
        self.prompt_best = told_width(
            max((s.params.prompt_logprobs or 0) for s in samples), engine.model.config.vocab_size
        )

    def __iter__(self) -> Iterator[tuple[int, Completion]]:
        try:
            while self.queue or self.live:
                self._fill()
                if not self.live:
                    self._clear()
                    continue
                for constrained in (False, True):
                    group = [s for s in self.live if (s.matcher is not None) == constrained]
                    if group:
                        yield from self._advance(group, constrained)
        finally:
            # Also when the caller stops early.
            self.engine.release([s.text for s in self.live if s.text is not None])
            self.engine.release(list(self.prompts.values()))

    def _fill(self) -> None:
        """Moves samples from the queue into free rows; each distinct prompt is read once."""
        free = self.rows - len(self.live)
        chosen = self._scored([self.queue[i] for i in range(min(free, len(self.queue)))])
        keys = self._places(chosen)
        held = [_start(sample, key[0]) for sample, key in zip(chosen, keys, strict=True)]
        self._read([key for key, text in zip(keys, held, strict=True) if text is None])
        for sample, key in zip(chosen, keys, strict=True):
            # Reading may have taken the pages of texts that were held before.
            text = _start(sample, key[0]) or self.prompts.get(key)
            if text is None:
                break
            begin = len(sample.prompt) if sample.begin is None else sample.begin
            sample.text = self.engine.fork(text, prompt_length=begin)
            self.live.append(self.queue.popleft())
        waiting = {tuple(s.prompt + s.tokens) for s in self.queue}
        for key in [key for key in self.prompts if key[1] not in waiting]:
            self.engine.release([self.prompts.pop(key)])

    def _scored(self, samples: list[Sample]) -> list[Sample]:
        """Those before the first whose prompt's scores, where they are asked for, find no room now.

        Before their prompts are read: scores hold pages of their own, and a cache need not have both.
        """
        for count, sample in enumerate(samples):
            prompt = tuple(sample.prompt)
            if sample.params.prompt_logprobs is None or prompt in self.scores:
                continue
            try:
                [self.scores[prompt]] = self.engine.score(self.weights, [prompt], best=self.prompt_best)
            except OutOfPages:
                return samples[:count]
        return samples

    def _clear(self) -> None:
        """Gives back what is held for later, where no sample found room and none decodes that would make some."""
        held = list(self.prompts.values())
        self.engine.release(held)
        self.prompts.clear()
        room = self.room
        if not held and (room is None or not any(room.spare(shard) for shard in range(self.engine.shards))):
            raise OutOfPages(_NO_ROOM)

    def _read(self, keys: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        """Reads prompts that no text holds, as many as there is room for."""
        missing = [key for key in dict.fromkeys(keys) if key not in self.prompts]
        while missing:
            try:
                shards, tokens = zip(*missing, strict=True)
                self.prompts |= dict(zip(missing, self.engine.admit(self.weights, tokens, shards), strict=True))
                return
            except OutOfPages as error:
                if self.room is None or not self.room.spare(error.shard):
                    missing = missing[: len(missing) // 2]

    def _places(self, samples: Sequence[Sample]) -> list[tuple[int, tuple[int, ...]]]:
        """Which part of the engine's rows takes each sample, with the tokens that it starts from: of those with free
        rows one that holds these tokens, else the emptiest."""
        counts = [0] * self.engine.shards
        for sample in self.live:
            if sample.text is not None:
                counts[sample.text.pages.shard] += 1
        keys: list[tuple[int, tuple[int, ...]]] = []
        known = set(self.prompts)
        for sample in samples:
            tokens = tuple(sample.prompt + sample.tokens)
            free = [shard for shard, count in enumerate(counts) if count < self.quota]
            text = _start(sample)
            known |= {(text.pages.shard, tokens)} if text is not None else set()
            shard = min(free, key=lambda shard: ((shard, tokens) not in known, counts[shard]))
            counts[shard] += 1
            keys.append((shard, tokens))
            known.add(keys[-1])
        return keys

    def _advance(self, group: list[Sample], constrained: bool) -> Iterator[tuple[int, Completion]]:
        steps = 1 if constrained else self.engine.max_steps
        best = told_width(max((s.params.logprobs or 0) for s in group), self.engine.model.config.vocab_size)
        while True:
            count = len(group)
            # Stop for a refill when a quarter of the rows has ended, or when the rest fits the next smaller bucket.
            keep = count - max(1, count // 4) if self.queue else smaller(bucket(count) - 1)
            rows, keys = self.table.of(group)
            mask = None
            if constrained:
                matchers: list[Matcher | None] = [s.matcher for s in group]
                matchers += [None] * (bucket(count) - count)
                mask = masks(matchers, self.engine.model.config.vocab_size)
            try:
                decoded = self.engine.extend(
                    self.weights,
                    [s.text for s in group if s.text is not None],
                    rows,
                    keys,
                    [s.limit for s in group],
                    steps=steps,
                    keep=keep,
                    mask=mask,
                    pause=self._pause(group),
                    best=best,
                    lookup=self.lookup,
                )
                break
            except OutOfPages as error:
                self._make_room(group, error.shard)
                if not group:
                    return
        for i, sample in enumerate(group):
            if (done := self._take(sample, decoded, i)) is not None:
                self._leave(sample)
                yield sample.number, done
        if constrained:
            yield from self._hurry([s for s in group if s in self.live])

    def _pause(self, group: Sequence[Sample]) -> np.ndarray | None:
        """Bits of the tokens after which each row waits for the host to look for its stop strings."""
        if self.room is None:
            return None
        width = -(-self.engine.model.config.vocab_size // 32)
        rows = [self.room.halts.setdefault(tuple(s.params.stop), np.zeros(width, np.uint32)) for s in group]
        return np.stack(rows + rows[:1] * (bucket(len(rows)) - len(rows)))

    def _leave(self, sample: Sample) -> None:
        """Takes a sample that has ended out of its row; its pages go to who wants them."""
        self.live.remove(sample)
        text, sample.text = sample.held, None
        if sample.keep is not None:
            try:
                self.engine.retract(text, len(text.tokens) - len(sample.prompt) - len(sample.tokens))
            except ValueError:
                pass  # A sliding window has passed the place where it ended.
            else:
                sample.keep(text)
                return
        self.engine.release([text])

    def _hurry(self, group: list[Sample]) -> Iterator[tuple[int, Completion]]:
        """Writes in one pass the tokens that grammars leave no choice in, with the scores that single steps give."""
        forced = [(sample, tokens) for sample in group if len(tokens := self._forced(sample)) > 1]
        if not forced:
            return
        samples, tokens = zip(*forced, strict=True)
        best = told_width(max((s.params.logprobs or 0) for s in samples), self.engine.model.config.vocab_size)
        try:
            scores = self.engine.append_scored(
                self.weights, [s.held for s in samples], tokens, heat=[_heat(s.params) for s in samples], best=best
            )
        except OutOfPages:
            return  # Single steps need less at once, and make room.
        for (sample, new), score in zip(forced, scores, strict=True):
            for token in new:
                sample.takes(token)
            sample.tokens += new
            sure = sample.params.logprobs_mode == "processed"
            sample.logprobs += [0.0] * len(new) if sure else score.logprobs.tolist()
            if (wanted := sample.params.logprobs) is not None:
                size = self.engine.model.config.vocab_size
                sample.best += [_sure(t, wanted, size) for t in new] if sure else _pairs(score.best, wanted)
            if (done := self._judge(sample)) is not None:
                self._leave(sample)
                yield sample.number, done

    def _forced(self, sample: Sample) -> list[int]:
        """What a sample's automaton dictates before an end token; nothing where another wish may ban it."""
        params = sample.params
        if sample.matcher is None or params.allowed_token_ids is not None or params.bad_words:
            return []
        if params.no_repeat_ngram_size:
            return []
        tokens = sample.matcher.forced()[: params.max_tokens - len(sample.tokens)]
        ends = self.table.ends(sample)
        return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]

    def _make_room(self, group: list[Sample], shard: int) -> None:
        """Gives pages back: those of prompts that wait, else the part's last row's, which starts again later where it
        was."""
        if self.prompts:
            self.engine.release(list(self.prompts.values()))
            self.prompts.clear()
            return
        if self.room is not None and self.room.spare(shard):
            return
        rows = [s for s in self.live if s.text is not None and s.text.pages.shard == shard]
        last = rows[-1]
        if len(rows) == 1:
            raise OutOfPages(_NO_ROOM, shard)
        self.live.remove(last)
        if last in group:
            group.remove(last)
        if last.text is not None:
            self.engine.release([last.text])
        last.text = None
        self.queue.appendleft(last)

    def _take(self, sample: Sample, decoded: Decoded, i: int) -> Completion | None:
        """Adds a chunk's tokens to a sample; its completion, if it has ended."""
        before = len(sample.tokens)
        sample.tokens = sample.held.tokens[len(sample.prompt) :]
        new = len(sample.tokens) - before
        sample.guessed += int(decoded.guessed[i])
        sample.right += int(decoded.right[i])
        sample.logprobs += decoded.logprobs[i, :new].tolist()
        if sample.params.logprobs is not None:
            rows = jax.tree.map(lambda x: x[i, :new], decoded.best)
            sample.best += _pairs(rows, sample.params.logprobs)
        if new and not sample.takes(sample.tokens[-1]):
            # Refused, as an end marker that comes too early: the next mask says what to write in its place.
            self.engine.retract(sample.held, 1)
            sample.tokens.pop()
            sample.logprobs.pop()
            del sample.best[len(sample.tokens) :]
            return self._unforced(sample)
        return self._judge(sample, stuck=bool(decoded.stuck[i]), ended=bool(decoded.ended[i]))

    def _unforced(self, sample: Sample) -> Completion | None:
        """An error where a token was refused and none is dictated in its place: it would be drawn for ever."""
        if sample.matcher is not None and sample.matcher.forced():
            return None
        told = "its grammar or thinking budget refuses a token that it allows: make it for the sampler's end tokens"
        return self._completion(sample, "error", error=f"prompt of example {sample.example}: {told}")

    def _judge(self, sample: Sample, *, stuck: bool = False, ended: bool = False) -> Completion | None:
        """A sample's completion, if it has ended."""
        if sample.params.stop and (found := self._stop_string(sample)) is not None:
            return found
        if stuck:
            why = why_stuck(sample.params, constrained=sample.matcher is not None)
            return self._completion(sample, "error", error=f"prompt of example {sample.example}: {why}")
        if sample.matcher is not None and sample.matcher.problem:
            return self._completion(sample, "error", error=sample.matcher.problem)
        if ended:
            told = sample.tokens if sample.params.include_stop_str_in_output else sample.tokens[:-1]
            return self._completion(sample, "stop", stop=sample.tokens[-1], text=self.decode(told))
        if len(sample.tokens) >= sample.params.max_tokens:
            return self._completion(sample, "length")
        return None

    def _stop_string(self, sample: Sample) -> Completion | None:
        """The completion that ends with the token at which the first stop string is whole, after `min_tokens`."""
        stops, least = sample.params.stop, sample.params.min_tokens
        low, high = least + 1, len(sample.tokens)
        # A character that still lacks bytes is not there yet.
        early = len(self.decode(sample.tokens[:least]).rstrip("\ufffd")) if least else 0
        if high < low or first_stop(self.decode(sample.tokens), stops, early) is None:
            return None
        while low < high:
            middle = (low + high) // 2
            none = first_stop(self.decode(sample.tokens[:middle]), stops, early) is None
            low, high = (middle + 1, high) if none else (low, middle)
        sample.tokens, sample.logprobs = sample.tokens[:low], sample.logprobs[:low]
        sample.best = sample.best[:low]
        if self.room is not None:
            halting = self.room.halts[tuple(sample.params.stop)]
            halting[sample.tokens[-1] // 32] |= np.uint32(1 << sample.tokens[-1] % 32)
        text = self.decode(sample.tokens)
        begin, end = cast("tuple[int, int]", first_stop(text, stops, early))
        kept = text[: end if sample.params.include_stop_str_in_output else begin]
        return self._completion(sample, "stop", stop=text[begin:end], text=kept)

    def _completion(self, sample: Sample, finish: Finish, *, text: str | None = None, **more: Any) -> Completion:
        scores, wanted = self.scores.get(tuple(sample.prompt)), sample.params.prompt_logprobs
        if scores is not None and wanted is not None:
            more["prompt_logprobs"] = tuple(scores.logprobs.tolist())
            more["prompt_best"] = tuple(_pairs(scores.best, wanted)) if wanted else ()
        return Completion(
            tuple(sample.tokens),
            tuple(sample.logprobs),
            finish,
            self.decode(sample.tokens) if text is None else text,
            sample.example,
            sample.sample,
            best=tuple(sample.best),
            policy_version=self.version,
            guessed=sample.guessed,
            right=sample.right,
            **more,
        )


def _start(sample: Sample, shard: int | None = None) -> Text | None:
    """The text that a sample may start from, in any part or in this one."""
    text = sample.start() if sample.start is not None and not sample.tokens else None
    return text if text is not None and shard in (None, text.pages.shard) else None


def told_width(best: int, vocab_size: int) -> int:
    """How many most probable tokens are computed where so many are asked for."""
    return min(bucket(best), vocab_size) if best else 0


def _pairs(best: Best, wanted: int) -> list[tuple[tuple[int, float], ...]]:
    """(token, log-probability) of the first `wanted` at each place [T, N]."""
    found = zip(best.tokens[:, :wanted].tolist(), best.logprobs[:, :wanted].tolist(), strict=True)
    return [tuple(zip(*row, strict=True)) for row in found]


def _sure(token: int, wanted: int, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """What is told of a token that alone may be drawn: the others' probability is 0."""
    others = [i for i in range(min(wanted + 1, vocab_size)) if i != token]
    return ((token, 0.0), *((i, -math.inf) for i in others))[:wanted]


def _heat(params: SamplingParams) -> float:
    """What logits are divided by before a token's log-probability is told."""
    divided = params.logprobs_mode == "temperature" and params.temperature >= GREEDY_BELOW
    return float(params.temperature) if divided else 1.0
