"""Interrupted training equals uninterrupted training, on the right data; a refusal changes nothing.

Composer and StreamingDataset are imported once, in a server that forks a process per training run: this file, run as a
script. Runs are killed with SIGKILL, by a callback at a given event or by an audit hook at a given rename.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

TRAINERS = Path(__file__).resolve().parent.parent / "trainers"
SCRIPT = TRAINERS / "composer_sft.py"
EPOCHS, SAMPLES, BATCH = 2, 44, 8
STEPS = math.ceil(SAMPLES / BATCH)
TRAINING = {"batch_size": BATCH, "lr": 2e-3, "warmup": 0.25, "eval_batch_size": 4, "checkpoint_steps": 2}
KILLED = -signal.SIGKILL


def serve() -> None:
    """Reads one request per line, runs it in forked processes, and answers with their exit codes."""
    sys.path.insert(0, str(TRAINERS))
    __import__("vtmix")  # first: it sets OMP_WAIT_POLICY
    __import__("composer_sft")
    __import__("with_composer.session")
    for line in sys.stdin:
        request = json.loads(line)
        children = [fork(request, rank) for rank in range(request["ranks"])]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


def fork(request, rank: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with Path(f"{request['log']}.{rank}").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        code = train(request, rank)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(request, rank: int) -> int:
    import composer_sft
    import torch

    torch.set_num_threads(1)
    if request["ranks"] > 1:
        ranks = str(request["ranks"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
    if request["kill_at_rename"]:
        sys.addaudithook(partial(kill_at_rename, request["kill_at_rename"]))
    composer_sft.train = partial(composer_sft.train, callbacks=[make_probe(request, rank)])
    sys.argv = [str(SCRIPT), request["config"]]
    return composer_sft.main()


def kill_at_rename(target: str, event: str, arguments) -> None:
    """Dies just before a file or folder of that name appears."""
    if event in ("os.rename", "os.link") and str(arguments[1]).endswith(target):
        os.kill(os.getpid(), signal.SIGKILL)


def make_probe(request, rank: int):
    """Records the sample ids of every step, and kills or poisons where the request says."""
    from composer import Callback

    class Probe(Callback):
        def batch_start(self, state, logger):
            ids = state.batch["sample_ids" if "sample_ids" in state.batch else "sample_id"]
            line = {"step": state.timestamp.batch.value + 1, "ids": ids}
            with Path(f"{request['record']}.{rank}").open("a") as file:
                file.write(json.dumps(line) + "\n")

        def batch_end(self, state, logger):
            if request["kill_at_step"] == state.timestamp.batch.value:
                os.kill(os.getpid(), signal.SIGKILL)

        def eval_end(self, state, logger):
            if request["kill_in_evaluation_after"] == state.timestamp.epoch.value:
                os.kill(os.getpid(), signal.SIGKILL)

        def fit_end(self, state, logger):
            if request["poison"]:
                import torch

                with torch.no_grad():
                    next(state.model.parameters()).fill_(math.nan)

    return Probe()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()


class Training:
    """A project folder whose trainer is run, killed and run again."""

    def __init__(self, server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.run = folder / "run"

    def start(self, *, ranks=1, kill_at_step=None, kill_at_rename=None, kill_in_evaluation_after=None, poison=False):
        """Runs the trainer; returns rank 0's exit code and what it said."""
        log = self.folder / "log"
        request = {
            "config": str(self.folder / "mixture.yaml"),
            "record": str(self.folder / "seen"),
            "log": str(log),
            "ranks": ranks,
            "port": free_port(),
            "kill_at_step": kill_at_step,
            "kill_at_rename": kill_at_rename,
            "kill_in_evaluation_after": kill_in_evaluation_after,
            "poison": poison,
        }
        before = len(self.said())
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        codes = json.loads(self.server.stdout.readline())
        assert len(set(codes)) == 1, "all ranks end alike"
        return codes[0], self.said()[before:]

    def said(self) -> str:
        log = self.folder / "log.0"
        return log.read_text() if log.exists() else ""

    def finish(self) -> str:
        code, said = self.start()
        assert code == 0, said
        return said

    def seen(self, rank: int = 0) -> list[list[str]]:
        """A rank's sample ids of every step; a step taken again must take the same samples."""
        steps: dict[int, list[str]] = {}
        for line in (self.folder / f"seen.{rank}").read_text().splitlines():
            found = json.loads(line)
            assert steps.setdefault(found["step"], found["ids"]) == found["ids"], f"step {found['step']} took others"
        return [steps[step] for step in sorted(steps)]

    def steps(self) -> list[dict]:
        return [json.loads(line) for line in (self.run / "training/steps.jsonl").read_text().splitlines()]

    def committed(self) -> dict[str, bytes]:
        """Everything the run has committed but for its checkpoints."""
        files = {str(path.relative_to(self.run)): path for path in sorted(self.run.rglob("*")) if path.is_file()}
        hidden = {name for name in files if name.startswith((".", "checkpoints/")) or "/." in name}
        return {name: path.read_bytes() for name, path in files.items() if name not in hidden}

    def losses(self, epoch: int) -> dict[str, float]:
        content = json.loads((self.run / f"losses/epoch-{epoch:04d}.json").read_text())
        return {name: loss["nats"] / loss["tokens"] for name, loss in content["domains"].items()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_model):
    """A project ready to train: pools, a detection written by hand, reference losses. Its model has dropout."""
    from conftest import project

    from vtmix import pooling, reference
    from vtmix.artifacts import DetectionReport, run_folder
    from vtmix.config import load

    folder = tmp_path_factory.mktemp("prepared")
    model = shutil.copytree(tiny_model, folder / "model")
    content = json.loads((model / "config.json").read_text()) | {"attention_dropout": 0.2}
    (model / "config.json").write_text(json.dumps(content))
    write = (getattr(project, "__wrapped__", None) or project.__pytest_wrapped__.obj)(folder, model)
    write(folder, model="model", epochs=EPOCHS, samples_per_epoch=SAMPLES, training=TRAINING)
    config = load(folder / "mixture.yaml")
    pooling.build(config, workers=1)
    shares = {"law": 0.2, "medicine": 0.3, "code": 0.5}
    DetectionReport(distribution=shares).publish(run_folder(config).detection)
    reference.build(config)
    return folder


@pytest.fixture
def make(server, prepared, tmp_path):
    """Makes a copy of the prepared project, with training settings of its own."""

    def copy(name: str, *, dropout: bool = True, packing=None, **training) -> Training:
        folder = with_settings(shutil.copytree(prepared, tmp_path / name), packing, training)
        return Training(server, folder if dropout else without_dropout(folder))

    return copy


def with_settings(folder: Path, packing, training) -> Path:
    """The project with other settings of packing and training."""
    import yaml

    content = yaml.safe_load((folder / "mixture.yaml").read_text())
    content |= {"mixture": {"packing": packing}, "training": content["training"] | training}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def without_dropout(folder: Path) -> Path:
    """The project with a model whose losses do not depend on how a batch is cut."""
    config = folder / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.0}))
    return folder


@pytest.fixture(scope="module")
def golden(server, prepared, tmp_path_factory):
    """The uninterrupted run."""
    training = Training(server, shutil.copytree(prepared, tmp_path_factory.mktemp("golden") / "project"))
    training.finish()
    return training


@pytest.fixture(scope="module")
def whole(server, prepared, tmp_path_factory):
    """The uninterrupted run without dropout, whole batches on one rank."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("whole") / "project")
    training = Training(server, without_dropout(folder))
    training.finish()
    return training


def equal(found: Training, golden: Training) -> None:
    assert found.seen() == golden.seen()
    assert found.steps() == golden.steps()
    assert found.committed() == golden.committed()


def test_each_epoch_reads_its_own_mixture_in_the_order_on_disk(golden):
    from vtmix.mds import Samples

    seen = golden.seen()
    for epoch in range(EPOCHS):
        ids = [sample["sample_id"] for sample in Samples(golden.run / f"mixture/epoch-{epoch + 1:04d}")]
        assert len(ids) == SAMPLES
        steps = seen[epoch * STEPS : (epoch + 1) * STEPS]
        assert [identity for step in steps for identity in step] == ids
        assert [len(step) for step in steps] == [8, 8, 8, 8, 8, 4]


def test_the_learning_rate_rises_once_and_falls_over_all_epochs(golden):
    steps = golden.steps()
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["epoch"] for line in steps] == [1] * 6 + [2] * 6
    # A quarter of 12 steps rises; the other nine are a cosine from 1 to 0.
    shares = [1 / 3, 2 / 3, 1.0] + [(1 + math.cos(math.pi * done / 9)) / 2 for done in range(9)]
    assert [line["lr"] for line in steps] == pytest.approx([2e-3 * share for share in shares], rel=1e-9)


def test_training_learns_and_the_exported_model_has_the_losses_that_were_committed(golden):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vtmix.mds import Samples

    model = AutoModelForCausalLM.from_pretrained(golden.run / "model").eval()
    assert AutoTokenizer.from_pretrained(golden.run / "model").chat_template
    committed = golden.losses(EPOCHS)
    for domain, loss in committed.items():
        nats = tokens = 0
        for row in Samples(golden.run / f"pool/{domain}/eval"):
            ids, labels = (torch.tensor(row[name].astype("int64"))[None] for name in ("input_ids", "labels"))
            count = int((labels[:, 1:] != -100).sum())
            with torch.no_grad():
                nats, tokens = nats + float(model(input_ids=ids, labels=labels).loss) * count, tokens + count
        assert nats / tokens == pytest.approx(loss, rel=1e-4)
        assert loss < golden.losses(0)[domain] - 0.3


def test_done_is_said_again_without_loading_composer(golden):
    before = golden.committed()
    code = f"import sys; sys.argv = ['composer_sft.py', {str(golden.folder / 'mixture.yaml')!r}]\n"
    code += f"sys.path.insert(0, {str(TRAINERS)!r})\nimport composer_sft\ncode = composer_sft.main()\n"
    code += "print(sorted({'composer', 'torch', 'streaming', 'transformers'} & set(sys.modules)))\nsys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
    assert "all 2 epochs were done before" in done.stderr
    assert golden.committed() == before


def test_training_killed_again_and_again_ends_like_an_uninterrupted_run(make, golden):
    training = make("killed")
    kills = [
        {"kill_at_step": 1},  # before any checkpoint
        {"kill_at_step": 3},  # within epoch 1
        {"kill_at_rename": "checkpoints/step-00000004"},  # saved, not yet visible
        {"kill_in_evaluation_after": 1},
        {"kill_at_rename": "losses/epoch-0001.json"},
        {"kill_at_rename": "mixture/epoch-0002"},
        {"kill_at_step": 9},  # within epoch 2
        {"kill_at_rename": "run/model"},
    ]
    for kill in kills:
        assert training.start(**kill)[0] == KILLED, kill
    training.finish()
    equal(training, golden)


def test_a_truncated_newest_checkpoint_falls_back_to_the_previous_one_said_aloud(make, golden):
    training = make("truncated")
    training.start(kill_at_step=5)
    state = training.run / "checkpoints/step-00000004/state.pt"
    os.truncate(state, state.stat().st_size // 2)
    said = training.finish()
    assert f"{state} holds" in said
    assert "falling back to the checkpoint after step 2" in said
    equal(training, golden)


def refused(training: Training, *messages: str, ranks: int = 1) -> None:
    before = training.committed()
    code, said = training.start(ranks=ranks)
    assert code == 1
    assert "Traceback" not in said
    for message in messages:
        assert message in said
    assert training.committed() == before


def test_training_is_not_resumed_on_another_mixture_nor_started_afresh(make):
    training = make("refused")
    training.start(kill_at_step=5)
    markers = sorted(training.run.glob("checkpoints/*/checkpoint.json"))
    contents = [json.loads(marker.read_text()) for marker in markers]
    for marker, content in zip(markers, contents, strict=True):
        marker.write_text(json.dumps(content | {"mixture": "f" * 64}))
    refused(training, "trained on another mixture of epoch 1", "f" * 64, contents[0]["mixture"], ranks=2)
    for marker in markers:
        marker.unlink()
    refused(training, "holds no intact checkpoint", "step-00000002", "step-00000004")


def test_training_whose_checkpoints_are_gone_is_not_started_afresh(make):
    training = make("gone")
    training.start(kill_at_step=8)
    shutil.rmtree(training.run / "checkpoints")
    refused(training, "holds no checkpoint though epoch 1 was trained")


def test_an_eval_loss_that_is_not_a_number_moves_no_weights(make, golden):
    training = make("poisoned")
    code, said = training.start(poison=True)
    assert code == 1
    assert "error: refusing to update weights: eval loss of 'law' is nan at epoch 1" in said
    assert "Traceback" not in said
    assert names(training.run / "weights") == ["epoch-0001.json"]
    assert names(training.run / "losses") == ["epoch-0000.json"]
    training.finish()  # evaluates again, from the checkpoint at the epoch's end
    equal(training, golden)


def test_a_training_loss_that_is_not_a_number_stops_at_its_step(make):
    training = make("diverged", lr=1e30)
    code, said = training.start()
    assert code == 1
    assert "lower training.lr" in said
    assert "Traceback" not in said
    assert "nan" not in (training.run / "training/steps.jsonl").read_text().lower()


def test_microbatches_and_ranks_change_no_loss(make, whole):
    halves = make("microbatches", dropout=False, microbatch_size=3)
    halves.finish()
    assert halves.seen() == whole.seen()
    ranks = make("ranks", dropout=False, eval_batch_size=3)
    code, said = ranks.start(ranks=2)
    assert code == 0, said
    # Rank r takes every other sample of the batch.
    for mine, first, second in zip(whole.seen(), ranks.seen(0), ranks.seen(1), strict=True):
        assert (first, second) == (mine[::2], mine[1::2])
    for other in (halves, ranks):
        same_losses(other, whole)


def same_losses(found: Training, expected: Training) -> None:
    """Equal but for the order in which numbers were added up."""
    for theirs, mine in zip(found.steps(), expected.steps(), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5), mine["step"]
        assert {**theirs, "loss": 0} == {**mine, "loss": 0}
    for epoch in range(EPOCHS + 1):
        assert found.losses(epoch) == pytest.approx(expected.losses(epoch), rel=1e-5)


def test_training_goes_on_with_another_number_of_ranks(make, whole):
    changing = make("changing", dropout=False)
    assert changing.start(ranks=2, kill_at_step=3)[0] == KILLED
    assert changing.start(kill_at_step=9)[0] == KILLED
    code, said = changing.start(ranks=2)
    assert code == 0, said
    same_losses(changing, whole)


PACKED = {"packing": {"length": 96, "multiple": 2}, "batch_size": 2}


def test_training_from_compressed_mixtures_in_a_store_is_training_from_those_on_disk(make, golden):
    import yaml

    training = make("stored")
    path = training.folder / "mixture.yaml"
    content = yaml.safe_load(path.read_text())
    content["mixture"] = {"store": (training.folder / "store").as_uri(), "compression": "zstd:1"}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert training.start(kill_at_step=8)[0] == KILLED
    training.finish()
    assert training.seen() == golden.seen()
    assert training.steps() == golden.steps()
    assert training.losses(EPOCHS) == golden.losses(EPOCHS)
    assert names(training.folder / "store") == [f"epoch-{epoch:04d}" for epoch in range(1, EPOCHS + 1)]
    assert names(training.run / "mixture") == [f"epoch-{epoch:04d}.json" for epoch in range(1, EPOCHS + 1)]
    for folder in (training.folder / "store").iterdir():
        assert names(folder) == ["index.json", "manifest.json", "shard.00000.mds.zstd"]


@pytest.fixture(scope="module")
def packed(server, prepared, tmp_path_factory):
    """The uninterrupted run on packed sequences, without dropout."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("packed") / "project")
    training = Training(server, without_dropout(with_settings(folder, PACKED["packing"], {"batch_size": 2})))
    training.finish()
    return training


def test_packed_training_takes_every_sequence_once_and_the_rate_follows_the_share_of_all_epochs(packed):
    from vtmix.mds import Samples

    seen, steps = packed.seen(), packed.steps()
    done = 0
    for epoch in range(EPOCHS):
        found = list(Samples(packed.run / f"mixture/epoch-{epoch + 1:04d}"))
        mine = steps[done : done + len(found) // 2]
        taken = [identity for step in seen[done : done + len(mine)] for identity in step]
        assert taken == [sequence["sample_ids"] for sequence in found]
        assert {line["epoch"] for line in mine} == {epoch + 1}
        done += len(mine)
        tokens = sum(int(sequence["lengths"].sum()) for sequence in found)
        assert mine[-1]["tokens"] - (steps[done - len(mine) - 1]["tokens"] if epoch else 0) == tokens
        every = EPOCHS * len(mine)
        rising = math.ceil(0.25 * every)
        for number, line in enumerate(mine, epoch * len(mine)):
            cosine = (1 + math.cos(math.pi * (number - rising) / (every - rising))) / 2
            share = (number + 1) / rising if number < rising else cosine
            assert line["lr"] == pytest.approx(2e-3 * share, rel=1e-9)
    assert done == len(steps)
    assert packed.losses(EPOCHS)["law"] < packed.losses(0)["law"] - 0.3


def test_packed_training_killed_again_and_again_ends_like_an_uninterrupted_run(make, packed):
    training = make("killed", dropout=False, **PACKED)
    for kill in ({"kill_at_step": 3}, {"kill_at_step": 15}):
        assert training.start(**kill)[0] == KILLED, kill
    training.finish()
    equal(training, packed)


def test_microbatches_and_ranks_change_no_loss_of_packed_training(make, packed):
    ranks = make("ranks", dropout=False, microbatch_size=1, **PACKED)
    code, said = ranks.start(ranks=2)
    assert code == 0, said
    same_losses(ranks, packed)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"packing": {"length": 96}}, "mixture.packing.multiple 1 cannot be divided among 2 ranks: set it to 2"),
        ({"batch_size": 9}, "training.batch_size 9 cannot be divided among 2 ranks: set it to 8"),
        ({"fsdp": {"state_dict_type": "full"}}, "training.fsdp needs GPUs"),
        ({"precision": "amp_bf16"}, "training.precision 'amp_bf16' needs a GPU"),
        ({"loggers": ["mlflow"]}, "training.loggers: 'mlflow' needs a package: `pip install mlflow`"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_carried_out_are_refused_in_one_line(make, setting, message):
    training = make("refused", **setting)
    code, said = training.start(ranks=2 if {"batch_size", "packing"} & set(setting) else 1)
    assert code == 2
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


def test_help_and_mistakes_answer_without_loading_composer(tmp_path):
    helped = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert "mixture.yaml" in helped.stdout
    missing = subprocess.run(
        [sys.executable, "-X", "importtime", SCRIPT, tmp_path / "none.yaml"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert missing.returncode == 2
    assert "none.yaml: no such file" in missing.stderr
    assert not re.findall(r"\| +(?:composer|torch|streaming|transformers)$", missing.stderr, re.MULTILINE)


if __name__ == "__main__":
    serve()
