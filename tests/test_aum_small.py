"""AuM-Small itself, at full size, trains on a CPU."""

import pytest
import torch
import torch.nn.functional as F

import aum


@pytest.mark.slow
def test_twenty_steps_of_batch_8_with_falling_loss():
    torch.manual_seed(0)
    model = aum.create_model("aum_small").train()
    optimizer = torch.optim.AdamW(aum.parameter_groups(model, 1e-4), lr=2e-4)
    spectra = torch.randn(10, 1, 256, 1)  # each class has its spectrum; clips differ in noise
    losses = []
    for _ in range(20):
        scene = torch.randint(10, (8,))
        loss = F.cross_entropy(model(spectra[scene] + torch.randn(8, 1, 256, 65)), scene)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    print(f"loss {first:.3f} -> {last:.3f}")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert last < 0.6 * first
