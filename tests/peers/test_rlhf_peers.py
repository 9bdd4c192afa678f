"""The losses of TRL and its gradients, on the same numbers; transformers reads our reward model."""

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

from tinygpt.core.config import GPTConfig
from tinygpt.core.model import GPT
from tinygpt.folders import checkpoint
from tinygpt.stages import dpo, reward, rlhf
from tinygpt.stages.rlhf import Config
from tinygpt.stages.samples import Samples
from tinygpt.text.tokenizer import BPETokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

N, T, EPS = 6, 7, 0.2


def stub(**attributes) -> MagicMock:
    """What a trainer's loss asks of itself; whatever it only logs is nobody's concern."""
    alone = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu", num_processes=1,
                            reduce=lambda x, reduction: x)  # fmt: skip
    usual = {"aux_loss_enabled": False, "current_gradient_accumulation_steps": 1, "beta": 0.3,
             "epsilon_low": EPS, "epsilon_high": EPS, "_metrics": defaultdict(lambda: defaultdict(list)),
             "accelerator": alone}  # fmt: skip
    return MagicMock(**usual | attributes)


@pytest.fixture
def numbers():
    rng = np.random.default_rng(0)
    mask = (np.arange(T) < rng.integers(2, T + 1, N)[:, None]).astype(np.float64)
    old = rng.normal(-1.5, 0.5, (N, T)) * mask
    return {
        "mask": mask, "old": old, "logp": old + rng.normal(0, 0.15, (N, T)) * mask,
        "ref": old + rng.normal(0, 0.3, (N, T)) * mask, "scores": rng.standard_normal(N),
    }  # fmt: skip


def mine(numbers: dict, algo: str) -> tuple[float, np.ndarray, np.ndarray]:
    config = Config(algo=algo, beta=0.3, num_generations=3, cliprange=EPS)
    samples = Samples(None, None, numbers["mask"], None, None)
    e = rlhf.experience(samples, numbers["old"], numbers["ref"], numbers["scores"], config)
    loss, d = rlhf.objective(numbers["logp"], e, config)
    return loss, d, e.advantage


def theirs(cls, numbers: dict, advantage: np.ndarray, **attributes) -> tuple[float, np.ndarray]:
    logp = torch.tensor(numbers["logp"], requires_grad=True)
    self = stub(**attributes)
    self._get_per_token_logps_and_entropies.return_value = (logp, torch.zeros(N, T), None)
    tensor = {name: torch.tensor(numbers[name]) for name in ("mask", "old", "ref")}
    inputs = {
        "prompt_ids": torch.zeros(N, 2, dtype=torch.long), "prompt_mask": torch.ones(N, 2, dtype=torch.long),
        "completion_ids": torch.zeros(N, T, dtype=torch.long), "completion_mask": tensor["mask"],
        "advantages": torch.tensor(advantage[:, 0]), "old_logps": tensor["old"].sum(1),
        "old_per_token_logps": tensor["old"], "ref_per_token_logps": tensor["ref"],
    }  # fmt: skip
    loss = cls._compute_loss(self, None, inputs)
    loss.backward()
    return float(loss.detach()), logp.grad.numpy()


def test_rloo(numbers):
    loss, d, advantage = mine(numbers, "rloo")
    expected, grad = theirs(trl.RLOOTrainer, numbers, advantage)
    assert loss == pytest.approx(expected, abs=1e-10)
    np.testing.assert_allclose(d, grad, atol=1e-10)
    assert (grad == 0).any() and (grad != 0).any()  # some are clipped


def test_grpo(numbers):
    loss, d, advantage = mine(numbers, "grpo")
    options = {"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "loss_type": "grpo",
               "importance_sampling_level": "token", "use_vllm": False, "_entropy_bonus_enabled": False,
               "args": SimpleNamespace(use_bias_correction_kl=False, delta=None)}  # fmt: skip
    expected, grad = theirs(trl.GRPOTrainer, numbers, advantage, **options)
    assert loss == pytest.approx(expected, abs=1e-10)
    np.testing.assert_allclose(d * numbers["mask"], grad, atol=1e-10)
    scores = torch.tensor(numbers["scores"]).reshape(-1, 3)  # as TRL scales: by groups, with n - 1
    scaled = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
    np.testing.assert_allclose(advantage[:, 0], scaled.ravel().numpy(), atol=1e-10)


def test_dpo():
    rng = np.random.default_rng(1)
    logps, refs = torch.tensor(rng.normal(-5, 2, (8, 3))), rng.normal(-15, 3, (2, 4))
    logps.requires_grad_()
    self = stub(f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], ld_alpha=None,
                precompute_ref_logps=True, use_weighting=False)  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(8, 4, dtype=torch.long), "attention_mask": torch.ones(8, 4),
        "completion_mask": torch.ones(8, 4, dtype=torch.long),
        "ref_chosen_logps": torch.tensor(refs[0]), "ref_rejected_logps": torch.tensor(refs[1]),
    }  # fmt: skip
    nothing = torch.zeros(8, 3)  # that is only logged
    logged = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
    output = SimpleNamespace(log_probs=logps, **logged)
    loss = trl.DPOTrainer._compute_loss(self, lambda **given: output, inputs, False)
    loss.backward()
    sums = logps.detach().numpy().sum(1)
    found, dc, dr = dpo.dpo(sums[:4], sums[4:], *refs, 0.3)
    assert found == pytest.approx(float(loss.detach()), abs=1e-10)
    np.testing.assert_allclose(np.append(dc, dr)[:, None] * np.ones(3), logps.grad.numpy(), atol=1e-10)


def test_transformers_gives_the_scores_of_our_reward_model(tmp_path):
    tokenizer = BPETokenizer.train("User: Assistant: What is it? red green blue " * 9, 300)
    config = GPTConfig(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=32)
    model = reward.with_head(GPT(config, np.random.default_rng(0)), 1)
    model.params["score.weight"] *= 10
    checkpoint.save(tmp_path, model, tokenizer)
    texts = [reward.encode(tokenizer, 10**6, "What is it?" * n, "blue", "red") for n in (1, 2, 1)]
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(peer).__name__ == "GPT2ForSequenceClassification"
    padded = torch.full((3, max(map(len, texts))), peer.config.pad_token_id)
    there = torch.zeros_like(padded)
    for row, ids in enumerate(texts):
        padded[row, : len(ids)], there[row, : len(ids)] = torch.tensor(ids), 1
    with torch.no_grad():
        scores = peer(padded, attention_mask=there).logits[:, 0].numpy()
        alone = [float(peer(torch.tensor(ids)[None].long()).logits[0, 0]) for ids in texts]
    np.testing.assert_allclose(reward.scores(model, texts), alone, atol=1e-5)
    np.testing.assert_allclose(reward.scores(model, texts), scores, atol=1e-5)
    peer.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    again, _ = checkpoint.load(tmp_path / "theirs", judge=True)
    np.testing.assert_array_equal(again.flat, model.flat)
