"""What prompts say of LoRAs, and what is refused before any file is opened."""

from pathlib import Path

import pytest

from img_serving.engines.diffusers.loras import LoraRefused, LoraUse, files_of, take_out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    (folder / "deep").mkdir(parents=True)
    for name in ("Pixel-Art.safetensors", "ink.v2.safetensors", "old.bin", "deep/hidden.safetensors", "ü.safetensors"):
        (folder / name).write_bytes(b"")
    (tmp_path / "outside.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("prompt", "words", "uses"),
    [
        ("a cat", "a cat", ()),
        ("a <b> cat", "a <b> cat", ()),
        ("a cat <lora:Pixel-Art>", "a cat", (LoraUse("Pixel-Art", 1.0),)),
        ("a <lora:pixel_art:0.8> cat", "a cat", (LoraUse("Pixel-Art", 0.8),)),
        ("<LORA: ink.v2 :-1.5> a", "a", (LoraUse("ink.v2", -1.5),)),
        ("a<lora:ink.v2:><lora:ü:.25>", "a", (LoraUse("ink.v2", 1.0), LoraUse("ü", 0.25))),
        ("<lora:ink.v2:1><lora:ink.v2:0.5>", "", (LoraUse("ink.v2", 0.5),)),
    ],
)
def test_a_prompt_without_its_loras(folder: Path, prompt: str, words: str, uses: tuple[LoraUse, ...]) -> None:
    assert take_out(prompt, folder) == (words, uses)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<lora:pixelart2>", "the nearest it has: Pixel-Art"),
        ("<lora:../outside>", "there is no LoRA"),
        ("<lora:deep/hidden>", "there is no LoRA"),
        ("<lora:/etc/passwd>", "there is no LoRA"),
        ("<lora:old>", "there is no LoRA"),
        ("<lora:>", "there is no LoRA ''"),
        ("<lora:ink.v2:strong>", "the weight of LoRA 'ink.v2' is a number from -10 to 10"),
        ("<lora:ink.v2:11>", "is a number from"),
        ("<lora:ink.v2:nan>", "is a number from"),
        ("<lora:ink.v2:1:0.5>", "is a number from"),
        ("<lora:ink.v2>" * 17, "names 17 LoRAs"),
        ("<lora:" + "x\x1b[2J" * 100 + ">", "x?[2Jx?[2J"),
    ],
)
def test_a_lora_that_cannot_be_had_is_refused(folder: Path, prompt: str, words: str) -> None:
    with pytest.raises(LoraRefused) as refused:
        take_out(f"secret words {prompt}", folder)
    assert words in str(refused.value)
    assert "secret" not in str(refused.value)
    assert "\x1b" not in str(refused.value)


def test_without_a_folder_a_lora_is_refused_and_not_painted_as_words() -> None:
    with pytest.raises(LoraRefused, match="no folder of them"):
        take_out("a <lora:any>", None)


def test_a_folder_that_is_gone_has_none(tmp_path: Path) -> None:
    assert files_of(tmp_path / "gone") == {}
