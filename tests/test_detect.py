"""Detection counts every sample once, whatever dies, and commits nothing it cannot stand behind."""


import pytest

from vtmix import cluster, pool
from vtmix.artifacts import run_folder
from vtmix.config import load
from vtmix.detect import detect


@pytest.fixture(scope="session")
def ray_cluster():
    with cluster.connect(cpus=4):
        yield


def test_smoke(project, ray_cluster, capfd):
    import time

    t = time.time()
    config = load(project())
    pool.build(config)
    print("pool", time.time() - t)
    t = time.time()
    report = detect(config)
    print("detect", time.time() - t)
    print(report.model_dump_json(indent=1)[:3000])
    t = time.time()
    detect(config)
    print("again", time.time() - t)
    out, err = capfd.readouterr()
    print("OUT", out, "ERR", err)
    folder = run_folder(config).detection.parent
    for p in sorted(folder.rglob("*")):
        print(p)
    assert 0
