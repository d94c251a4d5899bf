"""What opens and closes the gates of a pipeline."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import dedup
from data_prep.config_curate import DedupConfig
from tests.curated_dataset import dataset_of, sample
from tests.latents_without_encoders import make_dataset
from tests.tiny_pipeline import flip
from trainer.config_pipeline import GatesConfig
from trainer.data.manifest import encoding_folder, list_encodings
from trainer.frozen import compose
from trainer.gates import Facts, problems, read_facts

FACTS = Facts(dataset="data/x", rows_in=1000, rows_kept=400, duplicates=100, damaged=())


def said(facts=FACTS, **gates):
    return list(problems("encode", GatesConfig(**gates), facts))


def test_without_gates_everything_passes():
    assert said(replace(FACTS, rows_kept=0, damaged=("a",))) == []


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        (
            {"min_kept_frac": 0.41},
            [
                "400 of 1000 rows became samples, 40.0 %",
                "gates.encode.min_kept_frac=0.41 asks for 41.0 %",
                "kiln stats dataset=data/x",
                "give gates.encode.min_kept_frac=0.4.",
            ],
        ),
        (
            {"max_duplicate_frac": 0.2},
            [
                "100 of 400 samples are duplicates, 25.0 %",
                "gates.encode.max_duplicate_frac=0.2 allows 20.0 %",
                "data/x/dedup.html",
                "give gates.encode.max_duplicate_frac=0.25.",
            ],
        ),
    ],
)
def test_a_closed_gate_says_what_was_got_what_is_needed_and_what_to_change(gates, words):
    (problem,) = said(**gates)
    for each in words:
        assert each in problem


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 10_000))
def test_the_value_that_a_closed_gate_proposes_opens_it(rows_in, rows_kept, duplicates):
    kept, doubled = min(rows_in, rows_kept), min(rows_in, rows_kept, duplicates)
    facts = replace(FACTS, rows_in=rows_in, rows_kept=kept, duplicates=doubled)
    closed = {"min_kept_frac": 1.0, "max_duplicate_frac": 0.0}
    for key, value in closed.items():
        for problem in said(facts, **{key: value}):
            proposed = float(problem.rpartition(f"{key}=")[2].rstrip("."))
            assert said(facts, **{key: proposed}) == []


def test_facts_are_read_from_the_manifest_and_what_dedup_left(tmp_path):
    def twice(folder):
        return dataset_of(
            folder, [sample(1), sample(2)], [sample(1, "b"), sample(2, "b"), sample(3)]
        )

    for outcome in ("remove", "weight"):
        dataset = twice(tmp_path / outcome)
        assert read_facts(dataset, GatesConfig()).duplicates == 0
        words = [f"dataset={dataset}", f"outcome={outcome}"]
        assert dedup.run(compose(DedupConfig, "dedup", words)) == 0
        facts = read_facts(dataset, GatesConfig())
        assert (facts.rows_in, facts.rows_kept, facts.duplicates) == (5, 5, 2)


def test_integrity_names_what_is_damaged_or_missing_of_pictures_and_latents(tmp_path):
    dataset = make_dataset(tmp_path)
    encodings = list_encodings(dataset)
    gates = GatesConfig(integrity=True)
    assert read_facts(dataset, gates, encodings).damaged == ()
    folder = encoding_folder(dataset, encodings[0].fingerprint)
    wrong = [flip(dataset / "shards/00001.tar"), dataset / "index/00002.parquet"]
    wrong += [flip(folder / "00000.tar")]
    wrong[1].unlink()
    facts = read_facts(dataset, gates, encodings)
    assert facts.damaged == tuple(map(str, wrong))
    assert read_facts(dataset, GatesConfig(), encodings).damaged == ()
    (problem,) = said(facts, integrity=True)
    assert f"3 files are missing, or not what was published, e.g. {wrong[0]}" in problem
    assert "gates.encode.integrity=true" in problem
