"""Training on several processes, and training that is killed, end as one undisturbed process."""

import functools
import os
import signal
import socket

import pandas as pd
import pytest
import torch
from makers import TRAIN, Fresh, prepare

import main
from heclip import parallel
from heclip.checkpoint import load_checkpoint
from heclip.dataset import Run
from heclip.files import InputError
from heclip.loss import image_centric_loss
from heclip.model import HECLIP, configure


def ranks(work, *arguments):
    """Run work(*arguments) in two processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = [Fresh(work, *arguments, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
               for rank in range(2)]
    done = [one.wait() for one in started]
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    return done


@pytest.fixture(scope="module")
def small():
    prepare("parallel")
    return ["--dataset", "parallel", *TRAIN]


def compare_gradients():
    rank, world, device = parallel.start(torch.device("cpu"))
    torch.manual_seed(0)
    network = HECLIP(configure("test_vit", "heg", 7, 160, dropout=0.0))
    pixels, expression = torch.randn(8, 3, 160, 160), torch.randn(8, 7)
    loss = image_centric_loss(*network(pixels, expression)[:2])
    alone = torch.autograd.grad(loss, network.parameters())

    model = parallel.distribute(network, device)
    image, gene, _ = model(pixels[rank::world], expression[rank::world])
    shared = image_centric_loss(parallel.gather(image), parallel.gather(gene))
    shared.backward()
    torch.testing.assert_close(shared, loss)
    for parameter, gradient in zip(network.parameters(), alone, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)
    everyone = parallel.gather_interleaved(torch.arange(5.)[rank::world, None])
    assert torch.equal(everyone, torch.arange(5.)[:, None])
    print(f"rank {rank} of {world}: equal")
    del model
    parallel.finish()


def test_two_processes_have_the_loss_and_gradients_of_one():
    for rank, done in enumerate(ranks(compare_gradients)):
        assert f"rank {rank} of 2: equal" in done.stdout


def train_without_dropout(flags):
    """Dropout differs between ranks by design."""
    main.configure = functools.partial(configure, dropout=0.0)
    main.main(flags)


def test_two_processes_train_as_one(small, tmp_path):
    """test_vit has no batch norm, which differs between ranks by design, too."""
    flags = [*small, "--encoder", "test_vit", "--encoder_args", '{"img_size": 64}',
             "--image_size", "64", "--max_epochs", "1"]
    alone = Fresh(train_without_dropout, [*flags, "--save_path", str(tmp_path / "1")]).wait()
    assert alone.returncode == 0, alone.stderr
    done = ranks(train_without_dropout, [*flags, "--save_path", str(tmp_path / "2")])
    assert [one.stdout.count("epoch 1:") for one in done] == [1, 0]  # one writer
    one, two = (pd.read_csv(Run("parallel", "heg", tmp_path / n).losses) for n in "12")
    columns = ["train_loss", "validation_loss"]  # retrieval jumps where two spots are equally near
    pd.testing.assert_frame_equal(one[columns], two[columns], rtol=1e-3)


def test_a_batch_that_cannot_be_shared_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(main.parallel, "start", lambda device: parallel.Ranks(0, 2, device))
    with pytest.raises(InputError, match="--batch_size 15 cannot be shared equally by 2 processes"):
        main.main([*small, "--batch_size", "15", "--save_path", str(tmp_path)])


def train(flags):
    main.VALIDATIONS = 2  # each takes as long as several epochs
    main.main(flags)


def killed_in_the_third_epoch(flags):
    save = main.save_progress

    def save_and_arm(path, trained, optimiser, losses):
        save(path, trained, optimiser, losses)
        if len(losses) == 2:
            main.random_turns = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    main.save_progress = save_and_arm
    train(flags)


def assert_same(one, two):
    """Two saved files hold the same weights, to the last bit, and the same facts."""
    assert one.keys() == two.keys()
    for key in one.keys() - {"model", "optimiser"}:
        assert one[key] == two[key], key
    assert list(one["model"]) == list(two["model"])
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name


def test_killed_and_resumed_training_ends_in_the_same_model(small, tmp_path):
    """Each command in a process of its own, as users start them: even the last bits agree."""
    flags = [*small, "--max_epochs", "4", "--save_path", str(tmp_path / "run")]
    run = Run("parallel", "heg", tmp_path / "run")
    assert Fresh(train, flags).wait().returncode == 0
    losses = run.losses.read_text()
    undisturbed = {path: torch.load(path, weights_only=True)
                   for path in (run.checkpoint, run.last)}
    for path in (*undisturbed, run.losses):
        path.unlink()
    assert Fresh(killed_in_the_third_epoch, flags).wait().returncode == -signal.SIGKILL
    assert len(pd.read_csv(run.losses)) == 2
    resumed = Fresh(train, [*flags, "--resume"]).wait()
    assert "resuming after epoch 2" in resumed.stdout, resumed.stderr
    assert run.losses.read_text() == losses
    for path, content in undisturbed.items():
        assert_same(content, torch.load(path, weights_only=True))


def test_resume_starts_when_there_is_nothing_yet_and_adds_epochs(small, tmp_path, capsys):
    flags = [*small, "--save_path", str(tmp_path), "--schedule", "constant", "--resume"]
    main.main([*flags, "--max_epochs", "1"])
    main.main([*flags, "--max_epochs", "2"])
    assert "resuming after epoch 1" in capsys.readouterr().out
    assert list(pd.read_csv(Run("parallel", "heg", tmp_path).losses)["epoch"]) == [1, 2]


def test_a_resumed_run_keeps_the_best_model_where_later_epochs_are_worse(small, tmp_path,
                                                                         monkeypatch):
    flags = [*small, "--save_path", str(tmp_path), "--schedule", "constant", "--resume"]
    run = Run("parallel", "heg", tmp_path)
    for epochs, score, best in (("1", 0.5, 1), ("2", 0.4, 1), ("3", 0.6, 3)):
        monkeypatch.setattr(main, "validate", lambda fit, score=score: (0.0, score))
        main.main([*flags, "--max_epochs", epochs])
        assert load_checkpoint(run.checkpoint).epoch == best


def test_resume_refuses_another_run_and_a_damaged_file(small, tmp_path):
    flags = [*small, "--save_path", str(tmp_path), "--max_epochs", "1"]
    main.main(flags)
    with pytest.raises(InputError, match=r"--lr was 0.001, is 0.01"):
        main.main([*flags, "--resume", "--lr", "0.01"])
    last = Run("parallel", "heg", tmp_path).last
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"heg_last\.pt is damaged"):
        main.main([*flags, "--resume"])
