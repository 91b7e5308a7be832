"""Judge: a language model grades answers from 0 to 5 against what is right, as the paper has it.

Any endpoint that speaks OpenAI's chat completions will do, through the `openai` package. A grade is written to a file
as soon as it is there, so that no answer is paid for twice. The invariant: the key stays in the environment. Endpoints
echo what they were sent, so of what they say nothing is repeated but a status and a word like `model_not_found`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from msa_train.errors import UserError
from msa_train.evaluation.grades import Grades
from msa_train.evaluation.grading import REMINDER, RUBRIC, grade_in, material

ADDRESS = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?")
REFUSED = ("content_filter", "context_length_exceeded")  # of one answer, which then has no grade: others may


@dataclass(frozen=True)
class JudgeConfig:
    """Who grades, and where.

    Args:
        model: The judge's name at its endpoint.
        base_url: Address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1. Left out, what
            OPENAI_BASE_URL says, or OpenAI's own.
        key_variable: Environment variable with the endpoint's key, which is given nowhere else; any word will do for
            an endpoint that asks for none.
        temperature: 0 makes grades as repeatable as the endpoint can; null leaves it to the model, and some take no
            other.
        requests: Requests at once.
        input_price: US dollars per million tokens sent; with `output_price`, what grading cost is told.
        output_price: US dollars per million tokens written by the judge.
    """

    model: str
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    requests: int = 8
    input_price: float | None = None
    output_price: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if not self.model.strip():
            problems.append("model is empty: give the judge's name at its endpoint")
        # What is refused in these two is not repeated: it may be the key, put where it does not belong.
        if self.base_url is not None and not ADDRESS.fullmatch(self.base_url):
            problems.append("base_url is no plain address: give http(s)://host:port/path, no user, password or query")
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_variable):
            problems.append(
                "key_variable names no environment variable: give its name in capitals, not the key: OPENAI_API_KEY"
            )
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            problems.append(f"temperature is {self.temperature}: give 0 to 2, or null for the model's own")
        if self.requests < 1:
            problems.append(f"requests is {self.requests}: give at least 1")
        prices = (self.input_price, self.output_price)
        if prices != (None, None) and not all(price is not None and price >= 0 for price in prices):
            problems.append(f"input_price is {prices[0]}, output_price {prices[1]}: give both, 0 or more, or neither")
        if problems:
            raise UserError("judge: " + "; ".join(problems))


@dataclass(frozen=True)
class Spent:
    """What grading took.

    Args:
        requests: Requests that were answered.
        cached: Grades that needed none.
        ungraded: Answers without a grade, because the judge's reply was none.
        input_tokens: Tokens sent.
        output_tokens: Tokens written by the judge.
        unmetered: Requests whose tokens the endpoint did not tell; they are in no other figure but `requests`.
        cost: US dollars; None without prices.
    """

    requests: int = 0
    cached: int = 0
    ungraded: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    unmetered: int = 0
    cost: float | None = None

    def told(self) -> str:
        """One line for the terminal.

        >>> Spent(requests=4, cached=30, ungraded=1, input_tokens=2100, output_tokens=28, cost=0.0123).told()
        'judge: 4 requests, 30 grades known before, 1 answer not graded; 2,100 tokens in, 28 out, $0.0123'
        """
        counts = [_number(self.requests, "request"), _number(self.cached, "grade") + " known before"]
        if self.ungraded:
            counts.append(_number(self.ungraded, "answer") + " not graded")
        tokens = [_number(self.input_tokens, "token") + " in", f"{self.output_tokens:,} out"]
        if self.cost is not None:
            tokens.append(f"${self.cost:.4f}")
        if self.unmetered:
            tokens.append(f"without {_number(self.unmetered, 'request')} whose tokens the endpoint did not tell")
        return f"judge: {', '.join(counts)}; {', '.join(tokens)}"


class Judge:
    """Grades answers.

    Args:
        config: Who grades.
        cache: The file of grades. A later judge with the same model and temperature takes them from there, at no cost.

    Raises:
        UserError: `openai` is not installed, the key is not set, or the file cannot be used.
    """

    def __init__(self, config: JudgeConfig, cache: Path) -> None:
        self.config = config
        self._client = _connect(config)
        self._grades = Grades(cache)
        self._spent = Spent()
        self._lock = Lock()  # of what was spent

    @property
    def spent(self) -> Spent:
        """What this judge took so far."""
        config, spent = self.config, self._spent
        if config.input_price is None or config.output_price is None:
            return spent
        return replace(
            spent, cost=(spent.input_tokens * config.input_price + spent.output_tokens * config.output_price) / 1e6
        )

    def grade(self, items: Sequence[tuple[str, Sequence[str], str]]) -> list[int | None]:
        """Grades answers, several at once.

        An empty answer is 0 without a request, and one that stands there twice is asked once.

        Args:
            items: Question, right answers (at least one; agreement with any is enough) and the answer to grade.

        Returns:
            0 to 5, in the order of the answers. None where the judge's reply was no grade, twice; the next call asks
            again for such an answer.

        Raises:
            UserError: The endpoint does not grade. Grades that were there by then are in the cache.
        """
        digests, asked = [], {}
        for question, references, answer in items:
            assert references, "an answer is graded against at least one"
            message = material(question, references, answer)
            digest = self._digest(message) if answer.strip() else ""
            digests.append(digest)
            if digest and self._grades.get(digest) is None:
                asked[digest] = message
        pool = ThreadPoolExecutor(self.config.requests)
        try:
            futures = [pool.submit(self._ask, digest, message) for digest, message in asked.items()]
            for future in as_completed(futures):
                future.result()  # the first failure ends all; what is under way still comes into the cache
        finally:
            pool.shutdown(cancel_futures=True)
        self._add(cached=sum(map(bool, digests)) - len(asked))
        return [self._grades.get(digest) if digest else 0 for digest in digests]

    def _ask(self, digest: str, message: str) -> None:
        """Asks for a grade, and where the reply is none, once more.

        At temperature 0 the same request would get the same reply, so the second repeats what a reply must be.
        """
        for instructions in (RUBRIC, RUBRIC + REMINDER):
            grade = grade_in(self._reply(self._request(instructions, message)))
            if grade is not None:
                self._grades.add(digest, grade)
                return
        self._add(ungraded=1)

    def _request(self, instructions: str, message: str) -> dict[str, Any]:
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": message}]
        request = {"model": self.config.model, "messages": messages}
        return request if self.config.temperature is None else request | {"temperature": float(self.config.temperature)}

    def _digest(self, message: str) -> str:
        """Names a grade by all that is sent for it."""
        return hashlib.sha256(json.dumps(self._request(RUBRIC, message), sort_keys=True).encode()).hexdigest()

    def _reply(self, request: dict[str, Any]) -> str:
        """What the judge writes; empty where it writes nothing or refuses to."""
        import openai

        text, problem = "", "answers, but with no chat completion: check base_url, which often ends in /v1, and model"
        try:
            text = self._client.chat.completions.with_raw_response.create(**request).http_response.text
        except openai.OpenAIError as error:
            if getattr(error, "code", None) in REFUSED:
                return ""
            problem = _problem(error, self.config)
        match _json(text):
            case {"choices": [{"message": {**said}}, *_], **rest}:
                self._meter(rest.get("usage"))
                content = said.get("content")
                return content if isinstance(content, str) else ""
        # Outside of the handler: an error that is raised there takes along the one that was caught, and its texts.
        where = self.config.base_url or "the endpoint"
        raise UserError(f"judge: {where} {problem}; grades so far are in '{self._grades.path}'")

    def _meter(self, usage: Any) -> None:
        match usage:
            case {"prompt_tokens": int(sent), "completion_tokens": int(written)}:
                self._add(requests=1, input_tokens=sent, output_tokens=written)
            case _:
                self._add(requests=1, unmetered=1)

    def _add(self, **more: int) -> None:
        with self._lock:
            counts = {name: getattr(self._spent, name) + number for name, number in more.items()}
            self._spent = replace(self._spent, **counts)


def _connect(config: JudgeConfig) -> Any:
    """The endpoint's client, with its own time limits and retries."""
    try:
        import openai
    except ImportError as error:
        raise UserError("the judge needs the openai package: pip install msa-train[judge]") from error
    variable = f"judge: the environment variable {config.key_variable}"
    key = os.environ.get(config.key_variable)
    if not key:
        raise UserError(f"{variable} is not set: put the endpoint's key there, or any word if it asks for none")
    if not re.fullmatch("[!-~]+", key):  # no header may have it, and the error that says so quotes it
        raise UserError(f"{variable} holds a blank, a line break or a letter that no key has: set it to the key alone")
    for name in ("openai", "httpx2", "httpcore2"):  # below warnings they write what an endpoint's headers say
        logging.getLogger(name).setLevel(logging.WARNING)
    return openai.OpenAI(api_key=key, base_url=config.base_url)


def _problem(error: Exception, config: JudgeConfig) -> str:
    """What is wrong at the endpoint, and the mend."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return "does not answer in time: try again later, or lower requests"
    if isinstance(error, openai.APIConnectionError):
        return "cannot be reached: check base_url and the network"
    if not isinstance(error, openai.APIStatusError):
        return f"cannot be asked: {type(error).__name__}"
    mend = {
        401: f"set {config.key_variable} to a key of this endpoint",
        403: f"set {config.key_variable} to a key that may use '{config.model}'",
        404: f"check that it has the model '{config.model}', and base_url, which often ends in /v1",
        429: "lower requests, or see to the quota of the key",
    }.get(error.status_code, f"check that '{config.model}' is a chat model there")
    if error.status_code >= 500:
        mend = "try again later"
    elif error.param == "temperature":
        mend = "set temperature to null: this model takes none but its own"
    word = error.code or ""
    known = re.fullmatch("[a-z_]{1,40}", word) and os.environ.get(config.key_variable, "") not in word
    return f"answers {error.status_code}{f' ({word})' if known else ''}: {mend}"


def _json(text: str) -> Any:
    """What a text says, or None where it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _number(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
