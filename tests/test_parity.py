"""A batch's loss and adapter gradients against transformers and peft, at the vocabulary of SmolLM2.

Torch's log_softmax on CPUs adds the exponentials of a row in as many running fp32 sums as a vector register has lanes: 16 with
AVX-512, 8 without. Over 49,152 logits the sum that holds a likely token drops most of the tail, always downwards, so the
probabilities add up to more than one and the mean of all embeddings leaks into every gradient: with SmolLM2's weights the
reference in fp32 is 1.6e-4 from itself in fp64. Hence it stands here three times: as it is, in fp64, and in fp32 with that sum
by logsumexp.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine import lora
from engine.attention import PackedAttention
from engine.dropout import DropoutKeys
from engine.loss import summed_cross_entropy
from engine.models import weights

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

CPU = torch.device("cpu")
LENGTHS, PROMPT = [64, 30, 50, 12], 8  # documents of the batch; tokens at the beginning of each that are not supervised
ADAPTED = ["q_proj", "v_proj"]


@pytest.fixture(scope="module", params=["as adapters start", "as they have moved"])
def sides(request, tmp_path_factory):
    """Our model and peft's with the same weights, a batch, and peft's parameters by our names."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("llama", vocab_size=49152, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                               num_key_value_heads=2, initializer_range=0.1, tie_word_embeddings=True, pad_token_id=None,
                                               bos_token_id=None, eos_token_id=None)
    base = transformers.AutoModelForCausalLM.from_config(config)
    # as in a trained model: logits far apart, and a mean of all embeddings (two thirds of their length in SmolLM2)
    torch.nn.init.normal_(base.model.embed_tokens.weight, mean=1.0, std=0.4)
    folder = tmp_path_factory.mktemp("base") / "model"
    base.save_pretrained(folder)
    # the model's own writing, as its tokens are as likely as a trained model finds those of its rows
    written = base.generate(torch.randint(49152, (len(LENGTHS), 1)), do_sample=True, max_new_tokens=max(LENGTHS) - 1)
    ours = weights.build(folder, "pretrained", 0, torch.float32, torch.float32, CPU)
    lora.apply(ours, lora.Settings(rank=8, alpha=16, targets=ADAPTED), DropoutKeys(0), 7)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=ADAPTED, task_type="CAUSAL_LM"))
    pairs = {name: theirs.get_parameter(f"base_model.model.{name}.default.weight") for name, parameter in ours.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in pairs.items():
            if request.param == "as they have moved":
                torch.nn.init.normal_(ours.get_parameter(name), std=0.05)
            parameter.copy_(ours.get_parameter(name))
    return ours, theirs, [row[:length] for row, length in zip(written, LENGTHS, strict=True)], pairs


def batch_of_ours(ours, ids, pairs) -> tuple[float, list[Tensor], Tensor]:
    """Loss, gradients, logits; documents end to end."""
    positions, flat = torch.cat([torch.arange(length) for length in LENGTHS]), torch.cat(ids)
    supervised = (positions >= PROMPT).nonzero()[:, 0]
    hidden = ours(flat, positions, PackedAttention(LENGTHS, CPU))
    loss = summed_cross_entropy(hidden[supervised - 1], ours.lm_head.weight, flat[supervised]) / len(supervised)
    return loss.item(), torch.autograd.grad(loss, [ours.get_parameter(name) for name in pairs]), ours.lm_head(hidden).detach()


def batch_of_theirs(theirs, ids, pairs, exact: bool = False, log_softmax=None) -> tuple[float, list[Tensor], Tensor]:
    """The same, padded, and with transformers' own loss unless that is to be in fp64 or by another log-softmax."""
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    labels = padded.masked_fill(~real, -100)
    labels[:, :PROMPT] = -100
    theirs.to(torch.float64 if exact else torch.float32)
    out = theirs(input_ids=padded, attention_mask=real.long(), labels=labels)
    loss = out.loss
    if exact or log_softmax:
        loss = F.nll_loss((log_softmax or F.log_softmax)(out.logits[:, :-1].flatten(0, 1), -1), labels[:, 1:].flatten())
    return loss.item(), torch.autograd.grad(loss, list(pairs.values())), out.logits.detach()[real]


def apart(one, other) -> tuple[float, float]:
    """Relative differences of losses, and of all gradients together."""
    a, b = (torch.cat([grad.double().flatten() for grad in grads]) for _, grads, _ in (one, other))
    return abs(one[0] - other[0]) / abs(other[0]), float((a - b).norm() / b.norm())


def test_loss_and_adapter_gradients_of_a_batch_equal_transformers_and_peft(sides):
    ours, theirs, ids, pairs = sides
    found, plain, exact = batch_of_ours(ours, ids, pairs), batch_of_theirs(theirs, ids, pairs), batch_of_theirs(theirs, ids, pairs, exact=True)
    ordered = batch_of_theirs(theirs, ids, pairs, log_softmax=lambda logits, dim: logits - logits.logsumexp(dim, keepdim=True))
    assert all(grad.norm() > 0 for name, grad in zip(pairs, exact[1], strict=True) if name.endswith("lora_B"))
    assert (found[2] - plain[2]).abs().max() <= 1e-4 and exact[2].std() > 1
    for reference in (exact, ordered):
        loss, gradients = apart(found, reference)
        assert loss <= 1e-5 and gradients <= 2e-5
    # from the reference as it is we may be as far as it is from itself
    loss, gradients = apart(found, plain)
    own_loss, own_gradients = apart(plain, exact)
    assert loss <= max(1e-4, 1.1 * own_loss) and gradients <= max(1e-4, 1.1 * own_gradients)
