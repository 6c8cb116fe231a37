"""Kernel configurations: rules, names and keys."""

import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_attn_3.config import (
    MAX_SMEM_BYTES,
    ConfigError,
    Dtype,
    ForwardConfig,
    Mask,
    OutputBuffer,
    Rescale,
    Schedule,
    Score,
    SeqLayout,
)

CONFIG = ForwardConfig(
    Dtype.BF16, 128, 128, Mask.CAUSAL, SeqLayout.DENSE, Score.SCALED, block_m=128, block_n=128, num_stages=2
)
#: S and P share registers.
TURNS_ALONE = {"head_dim": 64, "head_dim_v": 64, "block_m": 192, "schedule": Schedule.PING_PONG}
FIELDS = [field.name for field in dataclasses.fields(ForwardConfig)]

ANY_CONFIG = st.builds(
    ForwardConfig,
    dtype=st.sampled_from(Dtype),
    head_dim=st.sampled_from((64, 96, 128, 192, 256)),
    head_dim_v=st.sampled_from((64, 96, 128, 192, 256)),
    mask=st.sampled_from(Mask),
    seq_layout=st.sampled_from(SeqLayout),
    score=st.sampled_from(Score),
    block_m=st.sampled_from((64, 128, 192)),
    block_n=st.integers(1, 16).map(lambda blocks: 16 * blocks),
    num_stages=st.integers(2, 8),
    schedule=st.sampled_from(Schedule),
    output_buffer=st.sampled_from(OutputBuffer),
    num_q_stages=st.integers(1, 2),
    polynomial_exp2_of_16=st.integers(0, 8),
    cluster_size=st.integers(1, 2),
)


def changed(config: ForwardConfig, field: str) -> ForwardConfig:
    """The configuration with another value in one field."""
    value = getattr(config, field)
    other = value + 1 if isinstance(value, int) else next(member for member in type(value) if member is not value)
    return dataclasses.replace(config, **{field: other})


@pytest.mark.parametrize("field", FIELDS)
def test_key_and_name_change_with_every_field(field):
    assert changed(CONFIG, field).key() != CONFIG.key()
    assert changed(CONFIG, field).name != CONFIG.name


def test_key_is_the_same_in_every_process():
    # Literal: a key that depends on hash randomisation or on the order of a set would differ between ranks.
    text = (
        "fwd;dtype=BF16;head_dim=128;head_dim_v=128;mask=CAUSAL;seq_layout=DENSE;score=SCALED;"
        "block_m=128;block_n=128;num_stages=2;schedule=BOTH;rescale=EAGER;output_buffer=OWN;"
        "num_q_stages=2;polynomial_exp2_of_16=0;cluster_size=1"
    )
    assert CONFIG.key() == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(("head_dim", "both", "alone"), [(64, 128, 176), (96, 112, 144), (128, 96, 128)])
def test_turns_alone_leave_room_for_more_keys(head_dim, both, alone):
    """192 rows: the most keys in a block, by the registers of S, P and O."""
    for schedule, most in ((Schedule.BOTH, both), (Schedule.PING_PONG, alone)):
        tile = {"head_dim": head_dim, "head_dim_v": head_dim, "block_m": 192, "schedule": schedule}
        lean = dataclasses.replace(CONFIG, **tile, num_q_stages=1, output_buffer=OutputBuffer.NONE)
        dataclasses.replace(lean, block_n=most).validate()
        with pytest.raises(ConfigError, match="registers"):
            dataclasses.replace(lean, block_n=most + 16).validate()


@given(ANY_CONFIG, ANY_CONFIG)
def test_equal_names_mean_equal_configurations(first, second):
    assert (first.name == second.name) == (first == second) == (first.key() == second.key())


@given(ANY_CONFIG)
def test_name_is_a_c_identifier(config):
    assert config.name.isidentifier() and config.name.isascii()


@given(ANY_CONFIG)
def test_valid_configurations_fit_the_machine(config):
    try:
        config.validate()
    except ConfigError as error:
        assert any(word in str(error) for word in (*FIELDS, "shared memory", "registers"))
        return
    assert config.smem_bytes <= MAX_SMEM_BYTES
    # setmaxnreg takes multiples of 8 up to 256 and moves registers within what the CTA was launched with: the 64K of a
    # multiprocessor divided by its threads, rounded down to a multiple of 8. Who asks for more waits forever.
    registers = 128 * (config.producer_registers + config.num_consumer_warpgroups * config.consumer_registers)
    assert registers <= 65536 // config.num_threads // 8 * 8 * config.num_threads
    assert config.producer_registers % 8 == config.consumer_registers % 8 == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 80}, r"head_dim=80 is not supported; it must be 64, 96, 128, 192 or 256"),
        ({"head_dim_v": 512}, r"head_dim_v=512 is not supported; it must be"),
        ({"block_m": 320}, r"block_m=320 is not supported; it must be 64, 128, 192 or 256"),
        ({"block_n": 24}, r"block_n=24 is not supported; it must be a multiple of 16"),
        ({"block_n": 272}, r"block_n=272 is not supported"),
        ({"num_stages": 1}, r"num_stages=1 is not supported; it must be in \[2, 8\]"),
        *(
            ({"block_m": 64, "schedule": turns}, rf"schedule={turns.name} is not supported; it must be INTRA_WARPGROUP")
            for turns in (Schedule.PING_PONG, Schedule.BOTH)
        ),
        (
            {"head_dim": 64, "head_dim_v": 128, "output_buffer": OutputBuffer.WITH_Q},
            r"output_buffer=WITH_Q is not supported; it must be OWN when head_dim_v exceeds head_dim",
        ),
        ({"num_stages": 4}, r"shared memory: \d+ bytes required by fwd_\w+, 232448 supported; reduce"),
        ({"head_dim": 64, "head_dim_v": 64, "block_m": 192, "block_n": 192}, r"registers: 200 per .* 160 supported"),
        (TURNS_ALONE | {"block_n": 192}, r"registers: 168 per .* 160 supported"),
        (
            {"block_m": 192, "schedule": Schedule.PING_PONG, "rescale": Rescale.ON_OVERFLOW}
            | {"num_q_stages": 1, "output_buffer": OutputBuffer.NONE},
            r"registers: 162 per .* 160 supported",
        ),
        (TURNS_ALONE | {"block_m": 256, "block_n": 96}, r"registers: 116 per .* 112 supported"),
    ],
)
def test_each_rule_names_what_is_wrong(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **changes).validate()
