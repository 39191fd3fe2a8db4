"""transformers' own common tests, run against our classes with tied and with untied heads.

The files come from the source distribution of the installed version; `test.sh` fetches them beside the environment and
checks their hash. What the distribution lacks (the tests of autoregressive generation and of export) is left out.
"""

import importlib
import sys
import types
import unittest
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from CoDALanguageModel import CoDAConfig, CoDALanguageModel
from CoDALanguageModel.modeling_coda import CoDAForMaskedLM, CoDAModel

FOLDER = Path(sys.prefix, "transformers-tests", transformers.__version__)
if not (FOLDER / "test_modeling_common.py").is_file():
    pytest.skip(f"no tests of transformers {transformers.__version__}: test.sh fetches them", allow_module_level=True)


def common_tests() -> tuple[types.ModuleType, types.ModuleType]:
    """The common tests of models and of configurations; files that the distribution lacks are empty."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(FOLDER)]
    absent = {
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "utils.test_configuration_utils": {"config_common_kwargs": COMMON_ARGUMENTS},
    }
    modules = {package.__name__: package}
    for name, names in absent.items():
        module = types.ModuleType(f"{package.__name__}.{name}")
        vars(module).update(names)
        modules[module.__name__] = module
    with mock.patch.dict(sys.modules, modules), mock.patch("transformers.utils.direct_transformers_import"):
        return tuple(
            importlib.import_module(f"{package.__name__}.test_{kind}_common") for kind in ("modeling", "configuration")
        )


COMMON_ARGUMENTS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["CoDALanguageModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}
modeling, configuration = common_tests()
NAMES = {"": "CoDAModel", "_FOR_CAUSAL_LM": "CoDALanguageModel", "_FOR_MASKED_LM": "CoDAForMaskedLM"}
for kind, name in NAMES.items():  # they know by name what a class can do; copies, since transformers reads these too
    known = f"MODEL{kind}_MAPPING_NAMES"
    setattr(modeling, known, {**getattr(modeling, known), "CoDA": name})

UNFIT = {
    "test_model_weights_reload_no_missing_tied_weights": "weights with gaps are refused by name",
    "test_causal_lm_loss_honors_shift_labels": "labels are of masked tokens, not of the token after each",
    "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions": "asked of sdpa, weights are an error",
}
"""Tests that ask for what this model does otherwise on purpose."""


class Tester:
    """Gives the common tests configurations and inputs."""

    __test__ = False
    is_training = True
    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 2, 7, 32, 2, 4

    def __init__(self, make_config: Callable[..., CoDAConfig]):
        self.get_config = make_config

    def prepare_config_and_inputs_for_common(self) -> tuple[CoDAConfig, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        inputs = {"input_ids": modeling.ids_tensor(shape, 64), "attention_mask": torch.ones(shape, dtype=torch.long)}
        return self.get_config(), inputs


class CommonTests(modeling.ModelTesterMixin):
    all_model_classes = (CoDAModel, CoDALanguageModel, CoDAForMaskedLM)
    all_generative_model_classes = ()  # `generate` fills masks; their tests are of one token after another
    tied = False

    @pytest.fixture(autouse=True)
    def _tester(self, tiny_config):
        self.model_tester = Tester(partial(tiny_config, tie_word_embeddings=self.tied))

    def test_model_outputs_equivalence(self):
        make = self.model_tester.get_config
        self.model_tester.get_config = partial(make, attn_implementation="eager")  # the one that gives weights
        super().test_model_outputs_equivalence()

    def test_config(self):
        tester = configuration.ConfigTester(self, config_class=CoDAConfig, hidden_size=32, vocab_size=99)
        tester.run_common_tests()


for name, reason in UNFIT.items():
    if not hasattr(CommonTests, name):  # of another version
        continue
    setattr(CommonTests, name, unittest.skip(reason)(getattr(CommonTests, name)))


class TestUntied(CommonTests, unittest.TestCase):
    @unittest.skip("an absent head is the embedding, and nothing is missing")
    def test_correct_missing_keys(self):
        pass


class TestTied(CommonTests, unittest.TestCase):
    tied = True


del CommonTests  # which is no test by itself
