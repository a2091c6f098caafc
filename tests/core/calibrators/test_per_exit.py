"""Thresholds exit by exit, against a search by hand."""

import pytest
import torch

import offramp
from offramp.errors import BadArgument
from offramp.testing.calibrators import toy_trace


@pytest.mark.parametrize("name", ["entropy", "confidence", "margin"])
def test_boldest_threshold_that_agrees(name):
    trace = toy_trace()
    cal = offramp.calibrate(trace, name, method="per_exit", agreement=0.9)
    assert cal.certificate is None and "uncertified" in cal.note and len(cal.policy.threshold) == 3
    up = type(cal.policy).safer == "up"
    values = trace.stats[{"confidence": "top1"}.get(name, name)]
    for k, threshold in enumerate(cal.policy.threshold):
        same = trace.label[:, k] == trace.label[:, -1]

        def share(t, k=k, same=same):
            stop = values[:, k] >= t if up else values[:, k] < t
            return float(same[stop].double().mean()) if stop.any() else 0.0

        assert share(threshold) >= 0.9
        bolder = [r.threshold for r in cal.policy.ladder((2, 4, 6), 5)]
        bolder = [t for t in bolder if (t < threshold if up else t > threshold)]
        assert all(share(t) < 0.9 for t in bolder)


def test_an_exit_that_is_never_good_gets_the_safest():
    trace = toy_trace()
    trace.label[:, 0] = (trace.label[:, -1] + 1) % 5
    cal = offramp.calibrate(trace, "confidence", method="per_exit", agreement=0.9)
    assert cal.policy.threshold[0] == 1.0 > cal.policy.threshold[2]


def test_messages():
    with pytest.raises(BadArgument, match="between 0 and 1, not 1.5"):
        offramp.calibrate(toy_trace(), "entropy", method="per_exit", agreement=1.5)
    with pytest.raises(BadArgument, match="Patience has none"):
        offramp.calibrate(toy_trace(), "patience", method="per_exit")


def test_drafts_come_from_several_depths():
    """Dynamic self-speculation on a real model: each draft from the first confident head."""
    from pathlib import Path

    import transformers as hf

    source = Path(__file__).parents[2] / "assets" / "pycode-5m-layerskip"
    model = hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(source)
    text = (source.parent / "pycode-5m" / "heldout.txt").read_text(encoding="utf8")[:40000]
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    offramp.attach(model, at=[4, 6, 8])
    trace = offramp.record(model, ids[: 60 * 64].view(60, 64))
    cal = offramp.calibrate(trace, "entropy", method="per_exit", agreement=0.85)
    prompt = ids[4000:4048][None]
    wanted = model.generate(prompt, max_new_tokens=60, do_sample=False, pad_token_id=0)
    with offramp.enable(model, cal, verify=True, draft="dssd") as run:
        assert torch.equal(model.generate(prompt, max_new_tokens=60, do_sample=False, pad_token_id=0), wanted)
        depths = {d for d in run.stats.exits if d < 12}
        assert len(depths) >= 2 and run.stats.accepted > 0.7 * run.stats.drafted
