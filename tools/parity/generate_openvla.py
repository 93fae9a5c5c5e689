"""Write a random OpenVLA as its authors' code saves it, and what that code makes of a few observations with it.

    PYTHONPATH=<openvla> python tools/parity/generate_openvla.py --variant openvla --output test/parity/openvla/openvla
    PYTHONPATH=<openvla-oft> python tools/parity/generate_openvla.py --variant oft --output test/parity/openvla/oft

<openvla> and <openvla-oft> are the sources of github.com/openvla/openvla and github.com/moojink/openvla-oft. Nothing of
vla_edge is imported, and nothing of theirs replaced but the sizes of the two vision towers. OpenVLA chooses among all
words, so that a random one would hardly ever write an action; its scores of words that stand for no action are held
down, as training does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from random_policies import TASKS, WORDS, Camera, asked, cropped, picture, randomize_, write_robot_facts  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

# one past Llama's empty word would do; the last 256 before the padding stand for actions
VOCABULARY, PADDING = 32064, 64
WIDTH, IMAGE = 16, 28
PROMPT = "In: What action should the robot take to {}?\nOut:"
TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": {"embed_dim": 32, "depth": 3, "num_heads": 16},
    "vit_so400m_patch14_siglip_224": {"embed_dim": 48, "depth": 3, "num_heads": 16, "mlp_ratio": 1.5},
}


@dataclass(frozen=True)
class Variant:
    """One reference policy.

    Attributes:
        joints: values of an action; proprio: of the state, 0 where none is read; chunk: actions at once.
        masked: the last value of an action is not scaled, as a gripper's.
    """

    cameras: dict[str, Camera]
    joints: int
    proprio: int = 0
    chunk: int = 1
    masked: bool = True
    sets: tuple[str, ...] = ("tabletop",)


VARIANTS = {
    "openvla": Variant({"head": Camera(40, 60, (2, 5, 36, 52))}, joints=7, sets=("bridge_orig", "tabletop")),
    # the sizes of actions are constants in OFT's code: LIBERO's
    "oft": Variant(
        {"head": Camera(40, 60, (2, 5, 36, 52)), "wrist": Camera(28, 28, (0, 0, 28, 28))}, joints=7, proprio=8, chunk=8
    ),
}  # fmt: skip


def main() -> None:
    arguments = asked(__doc__, VARIANTS)
    variant, output = VARIANTS[arguments.variant], arguments.output
    checkpoint, rng = output / "checkpoint", np.random.default_rng(arguments.seed)
    checkpoint.mkdir(parents=True, exist_ok=True)
    theirs = load_sources()
    tokenizer = write_tokenizer(checkpoint)
    model, parts = make_policy(theirs, variant, statistics(variant, rng), tokenizer)
    save(checkpoint, model, parts)
    names = [f"state_{index}" for index in range(variant.proprio)]
    more = {"state_names": names, "chunk_size": variant.chunk} if variant.proprio else {"unnorm_key": "tabletop"}
    write_robot_facts(checkpoint / "vla_edge.json", variant.joints, False, variant.cameras, **more)
    arrays = references(theirs, model, parts, variant, tokenizer, np.random.default_rng(1))
    np.savez_compressed(output / "reference.npz", **arrays)
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>9} {path.relative_to(output)}")


def load_sources() -> types.SimpleNamespace:
    """Their model and image processor, by file: their packages import TensorFlow and data sets on the way."""
    place = next(Path(entry) / "prismatic" for entry in sys.path if (Path(entry) / "prismatic" / "extern").is_dir())
    for name in ("prismatic", "prismatic.extern", "prismatic.extern.hf", "prismatic.models", "prismatic.vla"):
        package = types.ModuleType(name)
        package.__path__ = [str(place.parent / name.replace(".", "/"))]
        sys.modules[name] = package
    if (place / "training" / "train_utils.py").is_file():
        package = sys.modules["prismatic.training"] = types.ModuleType("prismatic.training")
        package.__path__ = [str(place / "training")]
    found = types.SimpleNamespace()
    wanted = {
        "modeling": "extern.hf.modeling_prismatic", "configuration": "extern.hf.configuration_prismatic",
        "processing": "extern.hf.processing_prismatic", "heads": "models.action_heads",
        "projectors": "models.projectors",
    }  # fmt: skip
    for key, name in wanted.items():
        if importlib.util.find_spec(f"prismatic.{name}"):
            setattr(found, key, importlib.import_module(f"prismatic.{name}"))
    create = timm.create_model

    def smaller(model_id, **options):
        return create(model_id, **options, **TOWERS[model_id])

    found.modeling.timm.create_model = smaller
    return found


def write_tokenizer(directory: Path):
    """A word-level stand-in for Llama's: it begins with <s> and knows the line break."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["in", "out", ":", "?", "what", "action", "should", "robot", "take", "newline", *WORDS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(("<unk>", "<s>", "</s>", *words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("\n", " newline "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    return fast


def statistics(variant: Variant, rng: np.random.Generator) -> dict:
    """As `norm_stats`, of each data set."""
    found = {}
    for key in variant.sets:
        found[key] = {}
        for feature, size in (("action", variant.joints), ("proprio", variant.proprio)):
            if not size:
                continue
            values = rng.normal(rng.normal(0, 0.5, size), rng.uniform(0.1, 0.8, size), (500, size))
            entry = {"mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0)}
            entry |= {"q01": np.quantile(values, 0.01, axis=0), "q99": np.quantile(values, 0.99, axis=0)}
            entry = {name: value.tolist() for name, value in entry.items()}
            entry["mask"] = [True] * (size - variant.masked) + [False] * variant.masked
            found[key][feature] = entry
    return found


def make_policy(theirs, variant: Variant, norm_stats: dict, tokenizer):
    """The model and, of OFT, its parts."""
    config = theirs.configuration.OpenVLAConfig(
        norm_stats=norm_stats,
        vision_backbone_id="dinosiglip-vit-so-224px",
        llm_backbone_id="llama2-7b-pure",
        image_resize_strategy="resize-naive",
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "pad_token_id": 2,
        },
        pad_token_id=2,
        pad_to_multiple_of=PADDING,
    )  # fmt: skip
    config.image_sizes = [IMAGE, IMAGE]
    model = theirs.modeling.OpenVLAForActionPrediction(config).eval()
    randomize_(model)
    used = sorted({*tokenizer.get_vocab().values(), 29871, *range(VOCABULARY - PADDING - 256, VOCABULARY - PADDING)})
    with torch.no_grad():
        for table in (model.language_model.model.embed_tokens.weight, model.language_model.lm_head.weight):
            # words nobody uses are zeros, and two bytes are enough for the rest: small to keep
            table.copy_(table.bfloat16().float() * torch.zeros(VOCABULARY, 1).index_fill(0, torch.tensor(used), 1.0))
    parts = {}
    if variant.proprio:
        parts["action_head"] = theirs.heads.L1RegressionActionHead(WIDTH, 24, variant.joints).eval()
        parts["proprio_projector"] = theirs.projectors.ProprioProjector(WIDTH, variant.proprio).eval()
        for part in parts.values():
            randomize_(part)
    return model, parts


def save(directory: Path, model, parts: dict) -> None:
    """config.json, two shards with their index, and OFT's parts."""
    model.config.save_pretrained(directory)
    content = json.loads((directory / "config.json").read_text())
    if parts:  # OFT keeps the statistics beside
        (directory / "dataset_statistics.json").write_text(json.dumps(content.pop("norm_stats")))
        (directory / "config.json").write_text(json.dumps(content, indent=2))
    tables = ("embed_tokens", "lm_head")
    tensors = {
        name: (value.bfloat16() if any(table in name for table in tables) else value).contiguous().clone()
        for name, value in model.state_dict().items()
    }
    places = {name: f"model-0000{1 + name.startswith('language_model')}-of-00002.safetensors" for name in tensors}
    for file in sorted(set(places.values())):
        save_file({n: tensors[n] for n in tensors if places[n] == file}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for name, part in parts.items():
        save_file(part.state_dict(), directory / f"{name}--1000_checkpoint.safetensors")


@torch.no_grad()
def references(theirs, model, parts, variant: Variant, tokenizer, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`<index>.<name>` -> array, for one observation per task."""
    towers = [(0.485, 0.456, 0.406), (0.5, 0.5, 0.5)], [(0.229, 0.224, 0.225), (0.5, 0.5, 0.5)]
    processor = theirs.processing.PrismaticImageProcessor(
        True, "resize-naive", [(3, IMAGE, IMAGE)] * 2, ["bicubic"] * 2, *towers
    )
    first = VOCABULARY - PADDING - 256
    arrays = {"tasks": np.array(TASKS)}
    for index, task in enumerate(TASKS):
        frames = {name: picture(camera.height, camera.width, rng) for name, camera in variant.cameras.items()}
        positions = rng.normal(0, 0.5, variant.proprio or variant.joints)
        pixels = torch.cat(
            [processor(Image.fromarray(cropped(frames[n], c)), return_tensors="pt")["pixel_values"]
             for n, c in variant.cameras.items()], dim=1,
        )  # fmt: skip
        text = tokenizer(PROMPT.format(task.lower()), return_tensors="pt")
        given = {"pixel_values": pixels, "attention_mask": text.attention_mask, "unnorm_key": "tabletop"}
        if variant.proprio:
            entry = model.norm_stats["tabletop"]["proprio"]
            low, high, mask = (np.array(entry[name]) for name in ("q01", "q99", "mask"))
            scaled = np.where(mask, 2 * (positions - low) / (high - low + 1e-8) - 1, positions).clip(-1, 1)
            model.vision_backbone.set_num_images_in_input(len(variant.cameras))
            actions, _ = model.predict_action(
                text.input_ids, **given, proprio=scaled[None].astype(np.float32), use_film=False, **parts
            )
            arrays[f"{index}.state"] = scaled.astype(np.float32)
        else:
            scores = []

            def held(_, found, scores=scores):
                found[:, :first] = found[:, first + 256 :] = -torch.inf
                scores.append(found[0, first : first + 256].clone())
                return found

            from transformers import LogitsProcessorList

            actions = model.predict_action(
                text.input_ids, **given, do_sample=False, logits_processor=LogitsProcessorList([held])
            )[None]
            arrays[f"{index}.scores"] = torch.stack(scores).numpy()
        arrays[f"{index}.positions"], arrays[f"{index}.actions"] = positions, actions
        arrays[f"{index}.tokens"] = text.input_ids.numpy()
        for name, frame in frames.items():
            arrays[f"{index}.frame.{name}"] = frame
    return arrays


if __name__ == "__main__":
    main()
