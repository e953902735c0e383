"""Checks of scoring in ranks; `python -m tests.rank_checks` runs all and prints their outcomes."""

import json
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from flowdata import LossScorer, ScoreMismatchError, Scores
from flowdata.errors import RankError
from flowdata.scoring import ranks
from tests.forks import bits, in_ranks
from tests.models import tiny_llama, token_samples

SAMPLES = token_samples(61)
MODEL = tiny_llama()
LINEAR = torch.nn.Linear(4, 3)


class SumAfter:
    """A loss before which something happens, other things on other ranks.

    What happens asks for its rank: a function that holds its rank's number is another loss on each.
    """

    def __init__(self, happens):
        self.happens = happens

    def __call__(self, model, batch):
        self.happens(batch)
        return batch[0].sum(1)


def score(samples=SAMPLES, model=MODEL, max_tokens=100, dtype="auto", **options):
    scorer = LossScorer(
        model, "causal_lm", dtype=dtype, max_tokens=max_tokens, token_losses=True, progress=False
    )
    return scorer.score(samples, **options)


def alone(samples=SAMPLES, **options):
    return bits(score(samples, **options))


# --- each check is run by this process, and runs ranks -------------------------------------------


def any_number_of_ranks_gives_the_bits_of_one():
    expected = alone()
    for workers, sizes in ((0, (1, 2, 3, 4)), (2, (1, 3))):
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                stored = in_ranks(size, _scored, SAMPLES, workers, f"{folder}/s")
                assert stored == [expected] * size, (size, workers, "store")
                assert bits(Scores.load(f"{folder}/s")) == expected
                names = sorted(path.name for path in Path(folder, "s").iterdir())
                assert names == ["manifest.json", "scores.safetensors"]
            in_memory = in_ranks(size, _scored, SAMPLES, workers, None)
            assert in_memory == [expected] * size, (size, workers, "memory")


def five_samples_on_four_ranks_have_their_own_median():
    for count in (1, 5, 7):
        expected = alone(SAMPLES[:count])
        assert in_ranks(4, _scored, SAMPLES[:count], 0, None) == [expected] * 4, count


def _scored(rank, samples, workers, store):
    return bits(score(samples, num_workers=workers, store=store))


def a_slow_rank_runs_fewer_packs():
    for workers in (0, 2):
        counts = in_ranks(2, _counted, workers)
        assert sum(counts) == 20, counts  # every pack once
        assert counts[0] > 2 * counts[1], counts


def _counted(rank, workers):
    packs = []

    def slow(batch):
        time.sleep(0.1 if dist.get_rank() == 1 else 0.01)
        packs.extend([1] * (len(batch[0]) == 2))  # the others are of the check

    data = torch.utils.data.TensorDataset(torch.randn(40, 4))
    scorer = LossScorer(LINEAR, SumAfter(slow), batch_size=2, progress=False)
    scorer.score(data, dataset_id="d", num_workers=workers)
    return len(packs)


def an_error_on_one_rank_ends_all_ranks_and_keeps_what_is_done():
    with tempfile.TemporaryDirectory() as folder:
        told = in_ranks(3, _one_fails, folder)
        assert told[1].startswith("RuntimeError: boom (while scoring samples "), told
        for other in (told[0], told[2]):
            assert other.startswith("RankError: stopped, because another rank failed: rank 1"), told
            assert other.endswith(told[1]), told
        assert list(Path(folder).glob("parts/*.safetensors"))
        assert not (Path(folder) / ".lock").exists()


def _one_fails(rank, folder):
    packs = []

    def fail(batch):
        packs.extend([1] * (len(batch[0]) == 2))
        time.sleep(0.01)
        if dist.get_rank() == 1 and len(packs) == 3:
            raise RuntimeError("boom")

    data = torch.utils.data.TensorDataset(torch.randn(400, 4))
    scorer = LossScorer(LINEAR, SumAfter(fail), batch_size=2, progress=False)
    try:
        scorer.score(data, dataset_id="d", store=folder)
    except (RuntimeError, RankError) as error:
        return f"{type(error).__name__}: {error}"


def other_arguments_on_one_rank_are_an_error_on_all():
    for told in in_ranks(3, _mismatched):
        assert told["data"].startswith("ScoreMismatchError: rank "), told
        assert "made with another data set" in told["data"], told
        assert "store must be given on all ranks or none" in told["store"], told
        assert "dataset is empty" in told["early"], told


def _mismatched(rank):
    told = {}
    for name, samples, options in (
        ("data", SAMPLES[rank % 2 :][:50], {}),
        ("store", SAMPLES[:5], {"store": tempfile.mkdtemp() if rank == 1 else None}),
        ("early", [] if rank == 2 else SAMPLES[:5], {}),
    ):
        try:
            score(samples, **options)
        except (ValueError, RankError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    assert score(SAMPLES[:5]).losses.isfinite().all()  # the next call is none the worse
    return told


def another_model_in_the_store_is_refused_on_all_ranks():
    with tempfile.TemporaryDirectory() as folder:
        score(store=folder)
        assert in_ranks(2, _other_model, folder) == [
            ["ScoreMismatchError", True],
            ["RankError", True],
        ]


def a_failed_first_rank_stays_until_the_others_have_heard():
    with tempfile.TemporaryDirectory() as folder:
        score(store=folder)
        assert in_ranks(2, _slow_to_hear, folder) == [
            ["ScoreMismatchError", True],
            ["RankError", True],
        ]


def _slow_to_hear(rank, folder):
    if rank == 1:
        ranks.sleep = lambda _: time.sleep(1)
    return _other_model(rank, folder)


def _other_model(rank, folder):
    try:
        score(store=folder, model=tiny_llama(rope_theta=77.0))
    except (ScoreMismatchError, RankError) as error:
        return [type(error).__name__, "made with another model" in str(error)]


def a_rank_can_score_alone():
    assert in_ranks(2, _alone) == [alone(), alone(SAMPLES[:9])]


def _alone(rank):
    if rank == 0:
        return bits(score(shared=False))
    return bits(score(SAMPLES[:9], shared=False))


def a_sharded_model_is_scored_by_its_ranks_together():
    expected = alone(dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        for store in (None, folder):
            for found, before, after in in_ranks(2, _sharded, store):
                assert found["count"] == expected["count"]
                error = _floats(found["loss"]) - _floats(expected["loss"])
                assert error.abs().max() < 1e-5, error
                assert before == after
        one = in_ranks(1, _sharded_fingerprint)[0]
        assert in_ranks(2, _sharded_fingerprint) == [one, one]


def _floats(values):
    return torch.tensor(values, dtype=torch.int32).view(torch.float32)


def _sharded_model():
    from torch.distributed.fsdp import fully_shard

    model = tiny_llama()
    if dist.is_initialized():
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def _sharded(rank, store):
    model = _sharded_model()
    before = [[str(type(p)), list(p.shape)] for p in model.parameters()]
    found = bits(score(model=model, store=store))
    return found, before, [[str(type(p)), list(p.shape)] for p in model.parameters()]


def _sharded_fingerprint(rank):
    from flowdata.store.fingerprint import fingerprint_model

    return fingerprint_model(_sharded_model())


def drift_has_the_same_bits_on_any_number_of_ranks():
    expected = _drift(0)
    for size in (1, 2, 3, 4):
        assert in_ranks(size, _drift) == [expected] * size, size


def a_sharded_model_has_the_drift_of_a_whole_one():
    expected = _drift_of(tiny_llama())
    for values in in_ranks(2, _sharded_drift):
        assert abs(values["kl"] - expected["kl"]) < 1e-6 * expected["kl"], values
        assert values["agreement"] == expected["agreement"]


def a_sharded_model_is_held_as_a_whole_one_or_refused():
    values = in_ranks(2, _held)
    assert values == [values[0]] * 2
    for value, whole, distance, message in values:
        assert abs(value - whole) < 1e-6 * whole, values
        assert distance < 1e-6, values
        assert "output layer's weight is sharded" in message, message


def _held(rank):
    from torch.distributed.fsdp import fully_shard

    from flowdata.drift import DriftMeter, OutputAnchor

    anchor = OutputAnchor(DriftMeter(tiny_llama(), SAMPLES[:6], dtype="float32"), 1.0, 6)
    whole, sharded, refused = tiny_llama(), _sharded_model(), tiny_llama()
    with torch.no_grad():
        for parameter in (*whole.parameters(), *sharded.parameters()):
            parameter.mul_(1.1)
    fully_shard(refused, reshard_after_forward=True)
    penalties = []
    for model in (whole, sharded):
        anchor._step = 0
        penalties.append(anchor(model))
        penalties[-1].backward()
    pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
    distance = max(float((a.grad - b.grad.full_tensor()).abs().max()) for a, b in pairs)
    try:
        anchor(refused)
    except TypeError as error:
        return penalties[1].item(), penalties[0].item(), distance, str(error)
    return penalties[1].item(), penalties[0].item(), distance, ""


def _drift(rank):
    return _drift_of(tiny_llama())


def _sharded_drift(rank):
    return _drift_of(_sharded_model())


def _drift_of(model):
    from flowdata.drift import DriftMeter

    meter = DriftMeter(model, SAMPLES[:20], dtype="float32")
    assert meter(model).kl == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return meter(model).to_dict()


def unreadable_samples_are_skipped_in_ranks_too():
    for found in in_ranks(3, _skipping):
        assert found["skipped"] == {"7": "OSError: disk gone", "30": "OSError: disk gone"}
        assert found["missing"] == [7, 30]


class Broken(list):
    def __getitem__(self, index):
        if index in (7, 30):
            raise OSError("disk gone")
        return super().__getitem__(index)


def _skipping(rank):
    scores = score(Broken(SAMPLES), on_error="skip", dataset_id="broken")
    missing = scores.losses.isnan().nonzero().flatten().tolist()
    return {"skipped": scores.metadata["skipped"], "missing": missing}


CHECKS = [
    any_number_of_ranks_gives_the_bits_of_one,
    five_samples_on_four_ranks_have_their_own_median,
    a_slow_rank_runs_fewer_packs,
    an_error_on_one_rank_ends_all_ranks_and_keeps_what_is_done,
    other_arguments_on_one_rank_are_an_error_on_all,
    another_model_in_the_store_is_refused_on_all_ranks,
    a_failed_first_rank_stays_until_the_others_have_heard,
    a_rank_can_score_alone,
    a_sharded_model_is_scored_by_its_ranks_together,
    unreadable_samples_are_skipped_in_ranks_too,
    drift_has_the_same_bits_on_any_number_of_ranks,
    a_sharded_model_has_the_drift_of_a_whole_one,
    a_sharded_model_is_held_as_a_whole_one_or_refused,
]


def main():
    torch.set_num_threads(1)  # no thread may be alive when ranks are forked
    outcomes = {}
    for check in CHECKS:
        begun = time.monotonic()
        try:
            check()
            outcomes[check.__name__] = ""
        except Exception:
            outcomes[check.__name__] = traceback.format_exc()
        outcomes[check.__name__ + " seconds"] = time.monotonic() - begun
    print("\n" + json.dumps(outcomes))


if __name__ == "__main__":
    main()
