from __future__ import annotations

import pytest

from gnet_opt import errors

CODES = {
    "ConfigError": 2,
    "MissingDependencyError": 3,
    "ModelError": 4,
    "CalibrationError": 5,
    "IntegrityError": 6,
    "BackendError": 7,
    "GateFailedError": 8,
    "RemoteError": 9,
}


def test_exit_codes_are_a_contract_with_scripts() -> None:
    kinds = {k.__name__: k.exit_code for k in errors.GnetOptError.__subclasses__()}
    assert kinds == CODES
    assert errors.GnetOptError.exit_code == 1


def test_require_passes_what_is_installed() -> None:
    errors.require("json", "build", "read JSON")


def test_require_says_what_to_install() -> None:
    with pytest.raises(errors.MissingDependencyError) as caught:
        errors.require("no_such_runtime", "openvino", "run model.xml")
    assert str(caught.value) == (
        "no_such_runtime is needed to run model.xml, and it is not installed. "
        'Install it with: pip install "gnet-opt[openvino]"'
    )
