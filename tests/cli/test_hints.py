"""What a mistyped command is told: what was meant."""

import socket

import huggingface_hub
import pytest

from lbpwht_jax.cli import main


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["finetune", "--dataset", "digit"], "unknown data set 'digit'; did you mean digits?"),
        (
            ["finetune", "--dataset", "photos"],
            "unknown data set 'photos'; for the images in this folder or zip file write folder:photos",
        ),
        (["finetune", "--dataset", "tfds-food101"], "did you mean tfds:food101?"),
        (["finetune", "--model", "ViT_micro_patch4"], "nearest: vit_micro_patch4_28"),
        (
            ["cost", "resnet50"],
            "unknown model 'resnet50'; the families are vit, deit, efficientformer, efficientformerv2, swinv2",
        ),
        (["predict", "run", "photos/*.png"], "run is no run folder"),
        (["modles"], "did you mean models?"),
    ],
)
def test_the_hint(arguments, hint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert hint in error and "list_models" not in error and "none" not in error


def test_a_longer_name_of_a_flag(capsys):
    assert main(["finetune", "--learning-rate", "-1"]) == 2
    assert "lr must be greater than 0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", "--learningrate", "1"])
    assert "--learning-rate" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_told_without_waiting(capsys, tmp_path, monkeypatch):
    """Its name is resolved first; then the hub's client, which would try for a while, looks into its cache alone, once."""
    asked, download = [], huggingface_hub.hf_hub_download

    def unresolved(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    def recorded(*arguments, **options):
        asked.append(options)
        return download(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", recorded)
    output = tmp_path / "a.safetensors"
    assert main(["convert", "vit_tiny_patch16_224", "timm/no_such_weights.anywhere", str(output)]) == 2
    error = capsys.readouterr().err
    assert "cannot be resolved: there is no network; download it elsewhere and pass the path of the file" in error
    assert asked == [{"local_files_only": True}]
    assert "Retrying" not in error and not output.exists()
