"""What is written down: one line a step, the same in TensorBoard, honest rates, and evaluation by tokens."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_dataset, ragged_rows, steps, write_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import metrics, report
from engine.attention import PackedAttention
from engine.data.tokenizer import load_tokenizer
from engine.dropout import DropoutKeys
from engine.lora import Settings, apply
from engine.loss import summed_cross_entropy
from engine.models import weights

CPU = torch.device("cpu")
SCALARS = ("train/loss", "train/lr", "train/grad_norm", "train/tokens_per_s", "train/target_tokens_per_s", "train/mfu", "train/loss_scale",
           "memory/peak_rss_mb", "time/data", "time/forward", "time/backward", "time/optimizer", "time/step")


@pytest.fixture
def watched_run(recipe, trained, tmp_path):
    rows = write_rows(tmp_path / "validation.jsonl", [{**row, "task": f"kind {i % 2}"} for i, row in enumerate(ragged_rows(11, seed=9))])
    trained(2, recipe("train.epochs=2", f"data.validation={rows}", "evaluate.exact_match_rows=-1", "evaluate.max_new_tokens=5", "evaluate.samples=2",
                      "checkpoint.keep=9"))
    return tmp_path / "runs/run"


def test_tensorboard_and_metrics_jsonl_hold_the_same_numbers(watched_run):
    lines = steps(watched_run)
    assert [line["step"] for line in lines] == list(range(7))
    events = EventAccumulator(str(watched_run / "tensorboard"))
    events.Reload()
    for name in SCALARS:
        assert [event.value for event in events.Scalars(name)] == pytest.approx([line[name] for line in lines[1:]])
    for name in ("validation/loss", "validation/perplexity"):
        assert [event.step for event in events.Scalars(name)] == [0, 3, 6]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([line[name] for line in lines if name in line])
    assert [event.step for event in events.Scalars("validation/exact_match")] == [6]
    texts = set(events.Tags()["tensors"])
    assert {"recipe/text_summary", "samples/text_summary"} <= texts and any("hparams" in tag for tag in events.summary_metadata)
    assert "global_batch: 8" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


def test_the_run_directory_describes_the_run(watched_run):
    record = json.loads((watched_run / "run.json").read_text())
    assert record["ranks"] == 2 and record["versions"]["torch"] and len(record["data"]) == len(record["weights"]) == 64
    assert record["trained"] == record["parameters"] and "sdpa" in record["attention"] and "fp32" in record["precision"]
    state = json.loads((watched_run / "checkpoints/step-000000006/state.json").read_text())
    lines = steps(watched_run)
    assert state["best"]["loss"] == min(line["validation/loss"] for line in lines[1:] if "validation/loss" in line)
    assert "validation/exact_match" in json.loads((watched_run / "finished.json").read_text())


def test_validation_loss_is_the_mean_over_supervised_tokens(watched_run, tiny, tmp_path):
    """Of the exported model, by torch's cross-entropy, each row alone; two ranks shared the rows unevenly."""
    model = weights.build(watched_run / "export/model", "pretrained", 0, torch.float64, torch.float64, CPU)
    rows = load_dataset(tmp_path / "validation.jsonl", load_tokenizer(tiny), "alpaca", 64, "error", tmp_path / "cache")
    total = 0.0
    for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        ids, mask = torch.from_numpy(rows.tokens[start:end].astype("int64")), torch.from_numpy(rows.supervised[start + 1 : end].copy())
        logits = model.lm_head(model(ids, torch.arange(len(ids)), PackedAttention([len(ids)], CPU)))[:-1]
        total += F.cross_entropy(logits[mask], ids[1:][mask], reduction="sum").item()
    last = steps(watched_run)[-1]
    assert last["validation/loss"] == pytest.approx(total / rows.supervised.sum(), rel=1e-6)


def test_speed_counts_real_tokens(watched_run, tiny, tmp_path):
    rows = load_dataset(tmp_path / "rows.jsonl", load_tokenizer(tiny), "alpaca", 64, "error", tmp_path / "cache")
    lines = steps(watched_run)[1:]
    assert sum(line["train/tokens"] for line in lines) == 2 * len(rows.tokens) and sum(line["train/targets"] for line in lines) == 2 * rows.supervised.sum()
    for line in lines:
        assert line["train/tokens_per_s"] * line["time/step"] == pytest.approx(line["train/tokens"])
        parts = [value for name, value in line.items() if name.startswith("time/") and name not in ("time/step", "time/checkpoint")]
        assert line["time/step"] == pytest.approx(sum(parts))
    assert [line["step"] for line in lines if line.get("time/checkpoint", 0) > 0] == [3, 6], "the step that paid for a save says so"


@pytest.mark.parametrize("rank", [0, 4])
def test_flops_equal_torchs_own_count(tiny, rank):
    """Matrix products as torch counts them; attention is compared apart, since the counter does not know causality."""
    from torch.utils.flop_counter import FlopCounterMode

    model = weights.build(tiny, "pretrained", 0, torch.float32, torch.float32, CPU)
    if rank:
        apply(model, Settings(rank, 8.0, ["q_proj", "down_proj"]), DropoutKeys(0), 0)
    ids, targets = torch.arange(60), torch.arange(25)
    with FlopCounterMode(display=False) as counter:
        hidden = model(ids, torch.arange(60), PackedAttention([60], CPU))
        summed_cross_entropy(hidden[:25], model.lm_head.weight, targets).backward()
    products = sum(flops for operation, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(operation))
    counted = metrics.Flops(model).of(60, 25, np.zeros(0))
    first_layer = 2 * 60 * 32 * (16 + 16) + (0 if not rank else 2 * 60 * 32 * 32)  # no gradient flows below the first layer's inputs
    assert products == pytest.approx(counted, abs=0 if not rank else first_layer + 2 * 60 * 4 * 32)


def test_attention_flops_are_those_of_the_pairs_that_see_each_other(tiny):
    model = weights.build(tiny, "random", 0, torch.float32, torch.float32, CPU)
    flops = metrics.Flops(model)
    # forward: two products of length² × width, halved by causality; backward five of them
    assert flops.of(0, 0, np.array([100, 50])) == 3 * (2 + 5) * 2 * (100**2 + 50**2) / 2 * 32
    flops.windows = (None, 20, 20)
    seen = 100**2 / 2 + 50**2 / 2 + 2 * (20 * 100 - 20**2 / 2 + 20 * 50 - 20**2 / 2)
    assert flops.of(0, 0, np.array([100, 50])) == (2 + 5) * 2 * seen * 32


@pytest.mark.parametrize(("found", "share", "why"), [
    (41, 41.0, "by NVML"), (ModuleNotFoundError("pynvml"), None, "not measured: nvidia-ml-py is not installed; pip install -c constraints.txt -e '.[gpu]'"),
    (Exception("Not Supported"), None, "not measured: NVML says Not Supported")])
def test_a_gpus_utilisation_or_why_there_is_none(monkeypatch, found, share, why):
    """NVML's own errors are plain exceptions: of a part of a GPU, or without permission. None of them ends a run."""

    def utilization(device):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    gpu = torch.device("cuda")
    assert metrics.utilisation(gpu) == (share, why)
    assert metrics.memory(gpu).get("memory/gpu_utilisation_percent") == share


def test_the_plan_is_an_equation_that_holds_for_any_share(watched_run, tmp_path):
    """Ranks share a step by its sequences' cost, so one may take more micro-batches than another; one rank takes them all."""
    said = (tmp_path / "ranks-0.log").read_text()
    assert "step  global batch 8 sequences = ranks 2 × 4 on average, shared by cost, in micro-batches of at most 2: accumulation about 2; 7 in the" in said
    assert report.batch(32, 8, 1) == "global batch 32 sequences = ranks 1 × 32, in micro-batches of at most 8: accumulation 4"
    assert report.batch(8, 2, 3).startswith("global batch 8 sequences = ranks 3 × 2.66667 on average")


def test_losses_and_shares_by_source_add_up_to_the_whole(recipe, trained, tiny, tmp_path):
    """Two sources of different formats and lengths; their losses weighed by their shares of the targets are the loss."""
    write_rows(tmp_path / "a.jsonl", ragged_rows(9, 1))
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue cat"}, {"role": "user", "content": "dog"},
             {"role": "assistant", "content": "fish fish fish"}]
    write_rows(tmp_path / "b.jsonl", [{"messages": turns}] * 5 + [{"messages": turns[:2]}] * 4)
    sources = f"[{{path: {tmp_path}/a.jsonl, weight: 1}}, {{path: {tmp_path}/b.jsonl, format: messages, name: chats, weight: 2}}]"
    trained(2, recipe(f"data.train={sources}", f"data.validation=[{{path: {tmp_path}/a.jsonl}}, {{path: {tmp_path}/b.jsonl, format: messages, name: chats}}]",
                      "data.packing=true", "train.global_batch=2", "train.epochs=2", "data.template=llama2", "data.max_length=96"))
    lines = steps(tmp_path / "runs/run")
    events = EventAccumulator(str(tmp_path / "runs/run/tensorboard")).Reload()
    for line in lines[1:]:
        assert sum(line[f"train/share/{name}"] for name in ("a", "chats")) == pytest.approx(1, abs=1e-12)
        weighed = sum(line[f"train/share/{name}"] * line.get(f"train/loss/{name}", 0) for name in ("a", "chats"))
        assert weighed == pytest.approx(line["train/loss"], rel=1e-6) and line["train/targets"] * line["train/share/a"] == pytest.approx(
            round(line["train/targets"] * line["train/share/a"]), abs=1e-6)
    rows = load_dataset(f"{tmp_path}/b.jsonl", load_tokenizer(tiny), "llama2", 96, "error", tmp_path / "cache", format="messages")
    plain = load_dataset(tmp_path / "a.jsonl", load_tokenizer(tiny), "llama2", 96, "error", tmp_path / "cache")
    counts = {"chats": int(rows.targets.sum()), "a": int(plain.targets.sum())}
    for line in (line for line in lines if "validation/loss" in line):
        weighed = sum(line[f"validation/loss/{name}"] * count for name, count in counts.items()) / sum(counts.values())
        assert weighed == pytest.approx(line["validation/loss"], rel=1e-6)
    assert {"train/loss/chats", "train/share/chats", "validation/loss/chats"} <= set(events.Tags()["scalars"])
    ledger = json.loads((tmp_path / "runs/run/ledger.json").read_text())["train"]
    assert [file["trained"] for file in ledger["files"]] == [{"2": 9}, {"4": 9}], "18 rows of the second to 9 of the first, two epochs"


@pytest.mark.parametrize("name, peak", [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
                                        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("Tesla T4", 65e12),
                                        ("NVIDIA GH200 480GB", 989e12), ("NVIDIA L40", None), ("NVIDIA RTX A1000", None), ("NVIDIA T400 4GB", None)])
def test_a_gpu_has_its_own_peak_and_no_others(monkeypatch, name, peak):
    """One that is not listed is measured, which needs it: a small product stands in."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "ones", lambda *size, **_: torch.full((2, 2), 1.0))
    found, told = metrics.peak_flops(torch.device("cuda"))
    assert told.startswith(name) and (found == peak if peak else "measured on a product of 4096 × 4096 in bf16" in told)
