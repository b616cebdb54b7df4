"""A judge's probabilities are its next token's, each domain's wherever it stood; what is no answer is unclassified."""

import asyncio
import copy
import json
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vtmix import judge as judges
from vtmix.classify import blank
from vtmix.encode import load_tokenizer
from vtmix.errors import ConfigError, DetectionError
from vtmix.judge import EndpointJudge, pause, read_reply
from vtmix.question import (
    inquiry,
    marker_probabilities,
    marker_tokens,
    prompt_tokens,
    rotations,
    without_turns,
)
from vtmix.settings import Endpoint, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DOMAINS = ("law", "medicine", "code")
KEY = "sk-0123456789-secret"


def asked(domains=DOMAINS, characters=100, **settings):
    return inquiry(Question(**settings), domains, characters)


# The question.


def test_the_prompt_shows_every_domain_behind_its_marker_and_the_text():
    (prompt,) = asked(options={"code": "source code"}).ask("def f(x): ...")
    assert "A. law\nB. medicine\nC. source code\n" in prompt
    assert "def f(x): ..." in prompt


@given(st.text(min_size=1, max_size=200), st.integers(1, 100))
def test_whatever_a_text_holds_it_is_put_as_it_is(text, characters):
    prompts = asked(prompt="{options}|{text}|", characters=characters).ask(text)
    shown = text[:characters].encode(errors="replace").decode()
    assert prompts == ([f"A. law\nB. medicine\nC. code|{shown}|"] if not blank(shown) else [])


@pytest.mark.parametrize(
    "text", ["{options}", "{text}", "{", "}{0}", "%s", "\\1 \\g<0>", "{{text}}", "{text.__class__}"]
)
def test_a_text_that_holds_a_field_fills_none(text):
    (prompt,) = asked(prompt="{text} of {options}").ask(text)
    assert prompt == f"{text} of A. law\nB. medicine\nC. code"


def test_a_lone_surrogate_is_replaced_since_it_cannot_be_sent():
    (prompt,) = asked().ask("a \ud800 b")
    assert "a ? b" in prompt
    assert prompt.encode()


@pytest.mark.parametrize("text", ["", " ", "\n\t\u2003", "\ufffd" * 9, "\x00\x1b \ufffd\u200b"])
def test_nothing_is_asked_about_a_blank_text(text):
    assert asked(permutations=3).ask(text) == []


@given(st.integers(1, 26), st.data())
def test_rotations_are_different_orders_and_all_of_them_put_everything_everywhere(count, data):
    turns = data.draw(st.integers(1, count))
    orders = rotations(count, turns)
    assert orders[0] == tuple(range(count))
    assert len(set(orders)) == turns
    assert all(sorted(order) == list(range(count)) for order in orders)
    if turns == count:
        assert all(sorted(place) == list(range(count)) for place in zip(*orders, strict=True))


@given(st.integers(1, 8), st.data())
def test_rows_are_probabilities_whatever_the_answers(count, data):
    turns = data.draw(st.integers(1, count))
    names = [f"d{number}" for number in range(count)]
    one = st.lists(st.floats(), min_size=count, max_size=count)
    answers = data.draw(st.lists(st.lists(one, min_size=turns, max_size=turns), max_size=4))
    rows = asked(names, permutations=turns).tally(answers)
    assert rows.shape == (len(answers), count + 1)
    assert (rows >= 0).all()
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("overflown", [np.nan, np.inf, -np.inf])
def test_a_turn_that_overflowed_is_no_answer_and_the_other_turns_are(overflown):
    rows = asked(permutations=3).tally([[[overflown, 0.5, 0.5]] * 3, [[0.5, 0, 0], [0.5, overflown, 0], [0, 0, 0]]])
    assert rows.tolist() == [[0, 0, 0, 1], [0.5 / 3, 0, 0, 1 - 0.5 / 3]]


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda shares: 0 < sum(shares) <= 1))
def test_a_domains_mass_is_found_wherever_it_stood(shares):
    question = asked(permutations=3)
    (row,) = question.tally([[[shares[domain] for domain in order] for order in question.orders]])
    np.testing.assert_allclose(row[:3], shares, atol=1e-12)
    assert row[3] == pytest.approx(1 - sum(shares), abs=1e-12)


@given(st.lists(st.floats(0, 1 / 3), min_size=3, max_size=3))
def test_a_preference_for_a_place_averages_out_over_all_places(by_place):
    (row,) = asked(permutations=3).tally([[by_place] * 3])
    np.testing.assert_allclose(row[:3], sum(by_place) / 3, atol=1e-12)


def test_what_is_not_answered_is_unclassified():
    rows = asked(permutations=3).tally([np.zeros((3, 3)), [[0.5, 0.25, 0], [0, 0, 0], [0, 0, 0]]])
    assert rows.tolist() == [[0, 0, 0, 1], [0.5 / 3, 0.25 / 3, 0, 1 - 0.75 / 3]]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"prompt": "{options}"}, r"prompt has no \{text\}"),
        ({"prompt": "{text}"}, r"prompt has no \{options\}"),
        ({"options": {"finance": "money"}}, "options name 'finance', expected only domains: law, medicine, code"),
        ({"markers": ("A", "B")}, "2 markers found, expected one for each of the 3 domains"),
        ({"markers": ("A", "B", "A")}, "markers 'A' stand for more than one domain"),
        ({"markers": ("A", "", " C")}, "markers '', ' C' are blank or begin or end with whitespace"),
        ({"permutations": 4}, r"permutations is 4, expected at most the number of domains \(3\)"),
    ],
)
def test_a_question_that_does_not_fit_the_domains_says_why(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        asked(**settings)


@pytest.mark.parametrize("markers", [("12", "1", "2"), ("law", "medicine", "lawyer")])
def test_markers_of_which_one_begins_another_are_refused_of_an_endpoint_alone(markers):
    endpoint = Endpoint(kind="endpoint", url="http://127.0.0.1/v1", model="m", markers=markers)
    pair = "'1' and '12'" if "1" in markers else "'law' and 'lawyer'"
    for refusing in (lambda: inquiry(endpoint, DOMAINS, 100), lambda: EndpointJudge(endpoint, DOMAINS, 100)):
        with pytest.raises(ConfigError, match=f"markers {pair} begin alike"):
            refusing()
    assert asked(markers=markers).markers == markers


def test_everything_wrong_with_a_question_is_named_at_once():
    with pytest.raises(ConfigError) as error:
        asked(prompt="Which?", markers=("A",), permutations=9)
    assert len(str(error.value).splitlines()) == 4


def test_more_domains_than_letters_need_markers():
    names = [f"d{number}" for number in range(27)]
    with pytest.raises(ConfigError, match="26 markers found, expected one for each of the 27 domains: set markers"):
        asked(names)
    assert len(asked(names, markers=tuple(names)).markers) == 27


# Markers as tokens.


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


def test_a_marker_counts_with_and_without_a_space_where_each_is_one_token(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert marker_tokens(tokenizer, ["A", "B"]) == [[vocabulary["A"]], [vocabulary["B"]]]
    assert "Ġcourt" in vocabulary  # the tiny tokenizer knows the word after a space alone, in one token
    assert marker_tokens(tokenizer, ["court"])[0] == [
        tokenizer("court", add_special_tokens=False).input_ids[0],
        vocabulary["Ġcourt"],
    ]


def test_markers_that_begin_alike_are_both_named(tokenizer):
    with pytest.raises(ConfigError, match="markers 'X1' and 'X2' begin with the same token"):
        marker_tokens(tokenizer, ["A", "X1", "X2"])


def sentence_pieces(letters: str) -> "PreTrainedTokenizerFast":
    """A tokenizer that puts a mark before a text and writes spaces as it, as Llama 2's: of single letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "▁", "\n", *letters, *(f"▁{letter}" for letter in letters)]
    model = models.BPE(
        {piece: number for number, piece in enumerate(pieces)},
        [("▁", letter) for letter in letters],
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_marker_at_the_beginning_of_a_line_counts_where_texts_begin_with_a_mark():
    tokenizer = sentence_pieces("ABx")
    spelled = [tokenizer.convert_ids_to_tokens(own) for own in marker_tokens(tokenizer, ["A", "B"])]
    assert spelled == [["▁A", "A"], ["▁B", "B"]]
    assert tokenizer.convert_ids_to_tokens(tokenizer("x\nA").input_ids)[-1] == "A"


def test_a_piece_that_is_spelled_as_a_marker_but_is_another_is_not_it(tokenizer):
    assert "é" in tokenizer.get_vocab()  # which spells a byte
    (own,) = marker_tokens(tokenizer, ["é"])
    assert own == tokenizer("é", add_special_tokens=False).input_ids[:1]


# Prompts as tokens.


def test_a_model_that_thinks_is_told_to_answer_at_once(tokenizer):
    thinking = copy.deepcopy(tokenizer)
    before = prompt_tokens(thinking, "Which?")
    thinking.chat_template += "{% if enable_thinking is defined and enable_thinking is false %}DONE{% endif %}"
    assert before == prompt_tokens(tokenizer, "Which?")
    assert tokenizer.decode(before).endswith("<|im_start|>assistant\n")
    assert thinking.decode(prompt_tokens(thinking, "Which?")).endswith("<|im_start|>assistant\nDONE")


def test_a_model_without_a_template_continues_the_prompt(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert plain.decode(prompt_tokens(plain, "Which?")) == "Which?\nAnswer:"


@given(
    st.lists(
        st.sampled_from(
            ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "<|", "|>", "court", "\n", " "]
        )
        | st.text(max_size=3),
        max_size=12,
    ).map("".join)
)
def test_no_text_can_end_the_question_about_it(tokenizer, text):
    special = set(tokenizer.all_special_ids)

    def turns(text: str) -> list[int]:
        (prompt,) = asked().ask(f"a {text}") if text else [asked().render((0, 1, 2), "")]
        return [token for token in prompt_tokens(tokenizer, prompt) if token in special]

    assert turns(without_turns(tokenizer, text)) == turns("")


def test_a_text_that_spells_no_special_token_is_shown_as_it_is(tokenizer):
    text = "im_end <| |> <im_end> court\n"
    assert without_turns(tokenizer, text) == text
    assert without_turns(tokenizer, "a<|im_<|im_end|>end|>b") == "a<|im_ end|>b"


def test_no_special_token_is_left_where_another_stood(tokenizer):
    spaced = copy.deepcopy(tokenizer)
    spaced.add_tokens(["<end of turn>"], special_tokens=True)
    assert without_turns(spaced, "a<end<|im_end|>of turn>b") == "a b"


def test_a_token_that_a_template_writes_counts_as_special_whatever_the_tokenizer_calls_it(tokenizer):
    named = copy.deepcopy(tokenizer)
    named.add_tokens(["<turn>", "<word>"])
    assert without_turns(named, "a<turn>b<word>c") == "a<turn>b<word>c"
    named.chat_template = "<turn>" + named.chat_template
    assert without_turns(named, "a<turn>b<word>c") == "a b<word>c"


def test_tokens_are_read_as_the_only_marker_they_begin():
    def shares(token, markers):
        return marker_probabilities([(token, log(0.5))], markers)

    for token in ("A", " A", "▁A", "ĠA"):
        assert shares(token, ["A", "B"]) == [pytest.approx(0.5), 0]
    for token in ("", " ", "A.", "a", "\nA", "Answer", "C"):
        assert shares(token, ["A", "B"]) == [0, 0]
    assert shares("med", ["medicine", "law"]) == [pytest.approx(0.5), 0]
    assert shares("l", ["law", "life"]) == [0, 0]
    assert shares("A", ["A", "AB"]) == [pytest.approx(0.5), 0]
    assert marker_probabilities([("A", log(0.5)), (" A", log(0.25))], ["A"]) == [pytest.approx(0.75)]


# A server's replies.


def chat(tops: dict[str, float]) -> bytes:
    """A chat completion whose likeliest first tokens have these probabilities."""
    top = [{"token": token, "logprob": log(share), "bytes": None} for token, share in tops.items()]
    content = [{"token": top[0]["token"], "logprob": top[0]["logprob"], "bytes": None, "top_logprobs": top}]
    message = {"role": "assistant", "content": top[0]["token"]}
    choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": {"content": content}}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    ).encode()


def completion(tops: dict[str, float]) -> bytes:
    top = {token: log(share) for token, share in tops.items()}
    found = {"tokens": [next(iter(top))], "token_logprobs": [0.0], "top_logprobs": [top], "text_offset": [0]}
    choice = {"index": 0, "text": "A", "finish_reason": "length", "logprobs": found}
    return json.dumps(
        {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
    ).encode()


GARBAGE = {
    "empty": b"",
    "no JSON": b"<html>Bad gateway</html>",
    "no object": b"[1, 2]",
    "null": b"null",
    "no choices": b'{"choices": []}',
    "no log-probabilities": b'{"choices": [{"message": {"content": "A"}, "logprobs": null}]}',
    "no tops": chat({"A": 0.5}).replace(b'"top_logprobs"', b'"tops"'),
    "empty tops": b'{"choices": [{"logprobs": {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": []}]}}]}',
    "nan": chat({"A": 0.5}).replace(b"-0.6931471805599453", b"NaN"),
    "infinite": chat({"A": 0.5}).replace(b"-0.6931471805599453", b"Infinity"),
    "positive": chat({"A": 0.5}).replace(b"-0.6931471805599453", b"0.7"),
    "text": chat({"A": 0.5}).replace(b"-0.6931471805599453", b'"likely"'),
    "huge": chat({"A": 0.5}).replace(b"-0.6931471805599453", b"1" + b"0" * 400),
    "more than all": chat({"A": 0.9, " A": 0.9}),
    "no token": chat({"A": 0.5}).replace(b'"A"', b"7"),
    "deep": b"[" * 100_000,
    "bytes": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("reply", GARBAGE.values(), ids=GARBAGE)
def test_a_reply_without_usable_log_probabilities_holds_no_answer(reply):
    assert read_reply(reply) == []


@given(
    st.recursive(st.none() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_no_reply_is_too_odd_to_be_read(value):
    assert read_reply(json.dumps({"choices": [{"logprobs": value}]}).encode()) == []


@pytest.mark.parametrize("reply", [chat, completion])
def test_log_probabilities_are_read_from_both_interfaces(reply):
    pairs = read_reply(reply({"A": 0.5, " B": 0.25}))
    assert [(token, round(value, 6)) for token, value in pairs] == [("A", -0.693147), (" B", -1.386294)]


# An endpoint.

Reply = tuple[int, bytes] | tuple[int, bytes, dict[str, str]] | tuple[int, bytes, dict[str, str], float]


class Sent(NamedTuple):
    """What a server sends: headers beside the usual ones, or in their place, and a pause before each byte."""

    status: int
    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})
    seconds: float = 0


class Server:
    """A server on loopback that replies as `answer` says, and counts what reaches it."""

    def __init__(self, answer: Callable[[str, int], Reply]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append({"path": self.path, **body})
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                    number = len(outer.requests)
                try:
                    prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
                    sent = Sent(*answer(prompt, number))
                finally:
                    with outer.lock:
                        outer.under_way -= 1
                usual = {"Content-Type": "application/json", "Content-Length": str(len(sent.body))}
                self.send_response(sent.status)
                for header in {**usual, **sent.headers}.items():
                    self.send_header(*header)
                self.end_headers()
                for part in [sent.body[i : i + 1] for i in range(len(sent.body))] if sent.seconds else [sent.body]:
                    time.sleep(sent.seconds)
                    self.wfile.write(part)
                self.close_connection = "Content-Length" in sent.headers

            def log_message(self, *arguments: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *arguments: object) -> None:  # a client that gave up
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *arguments: object) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts servers that end with the test."""
    started: list[Server] = []

    def start(answer: Callable[[str, int], Reply]) -> Server:
        started.append(Server(answer).__enter__())
        return started[-1]

    yield start
    for server in started:
        server.__exit__()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(judges, "FIRST_PAUSE", 0.01)


def judge(server: Server, characters=100, **settings):
    return EndpointJudge(
        Endpoint(**{"kind": "endpoint", "url": server.url, "model": "m", **settings}), DOMAINS, characters
    )


def by_place(prompt: str, _: int) -> Reply:
    """Answers with the marker that stands before the domain the text names."""
    lines = dict(reversed(line.split(". ")) for line in prompt.splitlines() if line[1:3] == ". ")
    named = next((lines[domain] for domain in DOMAINS if f"about {domain}" in prompt), "?")
    return 200, chat({named: 0.75, "A" if named != "A" else "B": 0.125})


def test_an_endpoints_answers_are_rows_in_the_order_of_the_texts(serve):
    texts = ["about code", "", "about law", "nothing", "about medicine"]
    rows = judge(serve(by_place), permutations=3)(texts)
    assert rows.shape == (5, 4)
    np.testing.assert_allclose(rows.sum(axis=1), 1)
    assert rows[[0, 2, 4]].argmax(axis=1).tolist() == [2, 0, 1]
    assert rows[0, 2] == pytest.approx(0.75)
    assert rows[1].tolist() == [0, 0, 0, 1]
    assert rows[3, :3] == pytest.approx([0.125 / 3] * 3)


@pytest.mark.parametrize(("api", "reply"), [("chat", chat), ("completions", completion)])
def test_what_is_asked_is_one_token_of_the_models_own_distribution(serve, api, reply):
    server = serve(lambda prompt, number: (200, reply({"B": 0.5})))
    assert judge(server, api=api)(["a text"]).tolist() == [[0, 0.5, 0, 0.5]]
    sent = server.requests[-1]
    assert sent["path"] == {"chat": "/v1/chat/completions", "completions": "/v1/completions"}[api]
    assert {name: sent[name] for name in ("model", "max_tokens", "temperature", "top_p")} == {
        "model": "m",
        "max_tokens": 1,
        "temperature": 1,
        "top_p": 1,
    }
    assert (sent["logprobs"], sent.get("top_logprobs")) == {"chat": (True, 20), "completions": (20, None)}[api]
    if api == "completions":
        assert sent["prompt"].endswith("\nAnswer:")


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_what_a_server_wants_besides_is_in_every_request(serve, api):
    server = serve(lambda prompt, number: (200, chat({"B": 0.5})))
    judge(server, api=api, extra_body={"chat_template_kwargs": {"enable_thinking": False}})(["a text"])
    assert [sent["chat_template_kwargs"] for sent in server.requests] == [{"enable_thinking": False}] * 2


def test_blank_texts_are_not_sent(serve):
    server = serve(by_place)
    assert judge(server)(["", " \n"]).tolist() == [[0, 0, 0, 1]] * 2
    assert judge(server)([]).shape == (0, 4)
    assert server.requests == []


def test_a_text_is_cut_to_the_given_characters(serve):
    server = serve(by_place)
    judge(server, characters=40)(["x" * 10_000])
    assert "x" * 40 in server.requests[-1]["messages"][0]["content"]
    assert "x" * 41 not in server.requests[-1]["messages"][0]["content"]


def test_no_more_requests_are_under_way_than_allowed(serve):
    def slowly(prompt: str, number: int) -> Reply:
        time.sleep(0.02)
        return by_place(prompt, number)

    server = serve(slowly)
    rows = judge(server, concurrency=4)([f"about {DOMAINS[number % 3]}" for number in range(60)])
    assert rows.argmax(axis=1).tolist() == [number % 3 for number in range(60)]
    assert 2 <= server.most_under_way <= 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_recovers_is_asked_again(serve, status):
    failing = {2, 3, 5}
    server = serve(lambda prompt, number: (status, b"{}") if number in failing else by_place(prompt, number))
    rows = judge(server, concurrency=1)([f"about {domain}" for domain in DOMAINS])
    assert rows.argmax(axis=1).tolist() == [0, 1, 2]
    assert len(server.requests) == 1 + 3 + len(failing)


@pytest.mark.parametrize(("asked_for", "seconds"), [("0", 0), ("1", 1), ("300", 0.2), ("soon", 0)])
def test_a_server_is_given_the_pause_it_asks_for_but_none_without_end(serve, monkeypatch, asked_for, seconds):
    if asked_for == "300":  # for which the client would not wait at all
        monkeypatch.setattr(judges, "LONGEST_ASKED", 0.2)
    busy = (429, b"{}", {"Retry-After": asked_for})
    times: list[float] = []

    def answer(prompt: str, number: int) -> Reply:
        times.append(time.monotonic())
        return busy if number == 2 else by_place(prompt, number)

    assert judge(serve(answer))(["about law"]).argmax() == 0
    assert len(times) == 3
    assert seconds <= times[2] - times[1] < seconds + 5


@given(st.integers(0, 10_000), st.text() | st.integers(0).map(str))
def test_pauses_grow_to_a_limit_and_are_as_long_as_asked_for(attempt, asked_for):
    seconds = pause(attempt, asked_for)
    assert min(0.01 * 2 ** min(attempt, 20), 60) / 2 <= seconds <= 600
    if asked_for.isascii() and asked_for.isdigit():
        assert seconds >= min(int(asked_for), 600)


def test_a_server_that_drips_is_given_up_and_asked_again(serve):
    server = serve(lambda prompt, number: (*by_place(prompt, number), {}, 0.05 if number == 2 else 0))
    assert judge(server, timeout=1)(["about law"]).argmax() == 0
    assert len(server.requests) == 3


def test_a_reply_that_breaks_off_is_asked_for_again(serve):
    def broken_off(prompt: str, number: int) -> Reply:
        status, reply = by_place(prompt, number)
        return status, reply, {"Content-Length": str(len(reply) + 100)} if number == 2 else {}

    server = serve(broken_off)
    assert judge(server)(["about law"]).argmax() == 0
    assert len(server.requests) == 3


def test_a_server_that_never_replies_in_time_is_named_with_the_time(serve):
    server = serve(lambda prompt, number: (*by_place(prompt, number), {}, 0.05))
    with pytest.raises(DetectionError, match=r"does not answer after 1 retries: no whole reply within 0\.2 s: see to"):
        judge(server, timeout=0.2, retries=1)(["about law"])
    assert len(server.requests) == 2


def test_a_request_that_hangs_is_given_up_and_made_again(serve):
    def hanging(prompt: str, number: int) -> Reply:
        time.sleep(1.5 if number == 2 else 0)
        return by_place(prompt, number)

    server = serve(hanging)
    assert judge(server, timeout=0.5)(["about law"]).argmax() == 0
    assert len(server.requests) == 3


@pytest.mark.parametrize("reply", [GARBAGE[name] for name in ("no JSON", "nan", "positive", "no log-probabilities")])
def test_garbage_about_one_text_leaves_the_others_judged(serve, reply):
    server = serve(lambda prompt, number: (200, reply) if "hostile" in prompt else by_place(prompt, number))
    rows = judge(server)(["about law", "hostile", "about code"])
    assert rows.argmax(axis=1).tolist() == [0, 3, 2]
    assert rows[1].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_text_the_server_refuses_is_unclassified(serve, status):
    server = serve(lambda prompt, number: (status, b"{}") if "hostile" in prompt else by_place(prompt, number))
    assert judge(server)(["about law", "hostile"]).argmax(axis=1).tolist() == [0, 3]


def test_a_server_without_log_probabilities_is_refused_after_one_request(serve):
    server = serve(lambda prompt, number: (200, GARBAGE["no log-probabilities"]))
    with pytest.raises(DetectionError, match="replies without log-probabilities"):
        judge(server)(["about law"] * 50)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_server_that_refuses_for_good_ends_the_work_in_one_line(serve, status):
    server = serve(lambda prompt, number: (status, b'{"error": {"message": "no such\\nmodel"}}'))
    with pytest.raises(DetectionError) as error:
        judge(server)(["about law"] * 50)
    message = str(error.value)
    assert f"the judge at {server.url} refuses to answer: Error code: {status}" in message
    assert "the variable OPENAI_API_KEY" in message
    assert "\n" not in message
    assert len(server.requests) == 1


def test_a_server_that_begins_to_refuse_ends_the_work_at_once(serve):
    server = serve(lambda prompt, number: (401, b"{}") if number > 5 else by_place(prompt, number))
    with pytest.raises(DetectionError, match="refuses to answer: Error code: 401"):
        judge(server, concurrency=2)(["about law"] * 100)
    assert len(server.requests) < 12


def test_a_server_that_stays_silent_is_given_up_after_the_retries(serve):
    server = serve(lambda prompt, number: (503, b'{"error": "overloaded"}'))
    with pytest.raises(DetectionError, match="does not answer after 2 retries: Error code: 503"):
        judge(server, retries=2)(["about law"])
    assert len(server.requests) == 3


def test_a_server_that_is_not_there_is_named(serve):
    server = serve(by_place)
    server.__exit__()
    with pytest.raises(DetectionError, match=f"the judge at {server.url} does not answer after 0 retries: Connection"):
        judge(server, retries=0)(["about law"])


# The key.


def test_the_key_is_sent_and_no_other_secret(serve, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "another")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "admin-secret")
    server = serve(by_place)
    judge(server)(["about law"])
    judge(server, key="OTHER_KEY")(["about law"])
    assert [headers["authorization"] for headers in server.headers] == [f"Bearer {KEY}"] * 2 + ["Bearer another"] * 2
    assert "admin-secret" not in str(server.headers)


def test_the_key_stands_in_no_error_although_the_server_repeats_it(serve):
    echo = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}."}}).encode()
    for status in (400, 401, 500):
        with pytest.raises(DetectionError) as error:
            judge(serve(lambda prompt, number, status=status: (status, echo)), retries=0)(["about law"])
        assert "Incorrect API key provided: …." in str(error.value)
        assert KEY not in "".join(traceback.format_exception(error.value))
        assert KEY.encode() not in pickle.dumps(error.value)
        assert error.value.__context__ is None


def test_the_key_stands_in_nothing_a_judge_is_or_is_made_from(serve):
    found = judge(serve(by_place))
    found(["about law"])
    for thing in (found, found._settings, found._settings.model_dump()):
        assert KEY not in repr(thing) + str(vars(found))
        assert KEY.encode() not in pickle.dumps(thing)


def test_a_server_on_this_machine_needs_no_key(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert judge(serve(by_place))(["about law"]).argmax() == 0
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    assert judge(serve(by_place))(["about law"]).argmax() == 0


@pytest.mark.parametrize("url", ["https://api.example.com/v1", "http://10.0.0.1:8000/v1"])
def test_any_other_server_needs_one(url, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="the environment variable OPENAI_API_KEY is not set"):
        EndpointJudge(Endpoint(kind="endpoint", url=url, model="m"), DOMAINS, 100)


@pytest.mark.parametrize("value", ["sk-1\r\nHost: elsewhere", "sk-é"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(value, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(ConfigError, match="holds characters that no key has") as error:
        EndpointJudge(Endpoint(kind="endpoint", url="https://api.example.com/v1", model="m"), DOMAINS, 100)
    assert value not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hush@api.example.com/v1",
        "https://hush@api.example.com",
        "https://api.example.com/v1?key=hush",
        "ftp://me:hush@api.example.com/v1",
        "me:hush@api.example.com/v1",
        "https://me:hush@[api/v1",
    ],
)
def test_a_secret_in_the_url_is_refused_unseen(url):
    with pytest.raises(ValidationError, match="url holds a user, a password or a query") as error:
        Endpoint(kind="endpoint", url=url, model="m")
    assert "hush" not in str(error.value)


@pytest.mark.parametrize("url", ["http://[::1]:8000/v1", "https://api.example.com/models/m@001"])
def test_a_url_without_a_secret_is_taken_as_it_is(url):
    assert Endpoint(kind="endpoint", url=url, model="m").url == url


def test_an_endpoint_can_be_asked_from_several_threads(serve):
    found = judge(serve(by_place))
    rows = asyncio.run(asyncio.to_thread(found, ["about code"]))
    assert rows.argmax() == 2
