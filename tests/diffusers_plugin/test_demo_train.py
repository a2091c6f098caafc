"""What a process of the pool trains and samples is what this one would."""

import torch
from diffusers import DDIMScheduler

from offramp_diffusers import digits
from offramp_diffusers.demo_train import Trainer, processes
from offramp_diffusers.policies.time_schedule import TimeSchedule
from offramp_diffusers.ways import Trial, Way


def test_a_process_of_the_pool_trains_and_samples_what_this_one_does(shaken, monkeypatch):
    monkeypatch.setattr(digits, "BATCH", 10)
    images, labels = digits.load()
    torch.manual_seed(0)
    full, schedule = shaken(digits.make(2, 16)), TimeSchedule((2, 1))
    trainer = Trainer({"sample": images, "class_labels": labels}, full, seed=3, answers=60)
    judge, _ = digits.train_judge(images, labels, 1)
    with torch.no_grad():
        trial = Trial(judge, judge.features(images), 20, 2, DDIMScheduler)
    with processes() as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
        job = pool.submit(trainer.tuned, full, schedule, 4, 1)
        torch.manual_seed(7)  # a DiT forgets classes by chance, and what was drawn before must not count
        here, there = trainer.tuned(full, schedule, 4, 1), job.result()
        weights = dict(there.named_parameters())
        assert all(torch.equal(p, weights[name]) for name, p in here.named_parameters())
        assert any(not torch.equal(p, weights[name]) for name, p in full.named_parameters())
        way = Way("early", here, schedule)
        one = trial.run(way, 0)
        two = Trial(judge, trial.real, 20, 2, DDIMScheduler, pool.map).run(way, 0)
    assert torch.equal(one.images, two.images) and one.saved == two.saved > 0
