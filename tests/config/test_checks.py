import pytest

from jaxlm.config import mesh_spec
from jaxlm.config.checks import RANGES, check, profile_window
from jaxlm.config.errors import UserError
from jaxlm.config.load import items, kinds, load
from jaxlm.config.schema import RunConfig


def check_run(*argv):
    config = load(RunConfig, argv)[0]
    spec = mesh_spec.parse(config.mesh)
    check(config, spec.resolve(spec.device_count))


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--mesh=dp4,tp2"],
        ["--mesh=rep2,dp2,tp2"],
        ["--mesh=tp4", "--model.kv-heads=2"],
        ["--mesh=cp4,tp2", "--data.sequence-length=24"],
        ["--mesh=cp4", "--context.method=ulysses", "--model.kv-heads=2", "--data.sequence-length=20"],
        ["--mesh=dp2,fsdp2", "--train.microbatches=4"],
        ["--optimizer.shard=data"],
        ["--mesh=ep2,cp2", "--model.experts=4", "--model.balance-loss=0.1"],
        ["--mesh=dp2,ep2,tp2", "--model.experts=4", "--model.experts-per-token=4", "--model.capacity-factor=1"],
        ["--data.validation=0", "--eval.every=0"],
        ["--data.sequence-length=2048", "--model.positions=rotary"],
        ["--model.embed=130", "--model.head-size=32"],
        ["--profile.steps=10:13"],
        ["--eval.prompt="],
        ["--data.path=a,b", "--data.weights=1,2"],
        ["--model.architecture=encoder", "--data.noise=0.15", "--mesh=pp2,cp2,tp2"],
        ["--model.biases=", "--model.norm=rms_offset"],
    ],
)
def test_what_works(argv):
    check_run(*argv)


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--model.layers=0"], ["--model.layers=0", "1 or more"]),
        (["--model.layers=0", "--mesh=pp2"], ["--model.layers=0", "1 or more"]),
        (["--train.microbatches=0", "--mesh=dp2"], ["--train.microbatches=0", "1 or more"]),
        (["--model.kv-heads=0"], ["--model.kv-heads=0", "1 or more"]),
        (["--model.windows=0,-1"], ["--model.windows=-1", "0 or more"]),
        (["--model.dropout=1"], ["--model.dropout=1", "below 1"]),
        (["--data.noise=1"], ["--data.noise=1", "below 1"]),
        (["--data.noise=0.1"], ["--data.noise=0.1 hides tokens", "--model.architecture=encoder"]),
        (["--model.architecture=encoder"], ["--data.noise=0 hides none", "use --data.noise=0.15"]),
        (["--model.biases=none"], ["--model.biases='none' is not one of qkv output mlp"]),
        (["--data.vocabulary=100"], ["--data.vocabulary=100", "257"]),
        (["--data.seed=-1"], ["--data.seed=-1"]),
        (["--data.weights=0"], ["--data.weights=0", "more than 0"]),
        (["--train.steps=3000000000"], ["--train.steps=3000000000", "or less"]),
        (["--optimizer.final-fraction=2"], ["--optimizer.final-fraction=2", "from 0 to 1"]),
        (["--run="], ["--run is empty"]),
        (["--data.path="], ["--data.path is empty"]),
        (["--model.embed=130"], ["--model.embed=130", "--model.heads=4", "use --model.embed=128"]),
        (["--model.kv-heads=3"], ["--model.kv-heads=3", "use --model.kv-heads="]),
        (["--model.positions=rotary", "--model.head-size=33"], ["33 is odd", "34"]),
        (["--model.rope-scaling=linear"], ["no effect", "set --model.positions to rotary"]),
        (["--model.positions=rotary", "--model.rope-factor=8"], ["no effect", "linear, llama3 or yarn"]),
        (["--model.rope-frequencies=9,4"], ["below"]),
        (["--model.rope-frequencies=1"], ["two"]),
        (["--model.windows=1,2,3,4,5"], ["5 lengths", "4 or fewer"]),
        (["--data.weights=1,2"], ["2 numbers", "1 corpora"]),
        (["--data.validation=0"], ["--data.validation=0", "--eval.every=0"]),
        (["--data.sequence-length=2000"], ["1024 learned positions", "--model.max-positions=2000"]),
        (["--precision.compute=float16", "--precision.params=bfloat16"], ["--precision.params=float32"]),
        (["--profile.steps=10"], ["first:last"]),
        (["--profile.steps=590:601"], ["--train.steps=600"]),
        (["--mesh=pp8"], ["--model.layers=4 does not fill pp 8", "use pp4 or --model.layers=8"]),
        (["--mesh=pp2", "--pipeline.schedule=interleaved", "--pipeline.chunks=3"], ["2 x --pipeline.chunks=3 = 6"]),
        (["--mesh=pp2", "--pipeline.schedule=interleaved", "--pipeline.chunks=1"], ["use --pipeline.chunks=2"]),
        (["--mesh=pp4", "--pipeline.microbatches=2"], ["fewer than pp 4", "use --pipeline.microbatches=4"]),
        (["--mesh=pp2", "--train.microbatches=4"], ["--train.microbatches=4 with pp", "--pipeline.microbatches=4"]),
        (["--mesh=pp2", "--pipeline.microbatches=3"], ["--data.batch-size=16", "pipeline microbatches 3 = 3", "15"]),
        (["--mesh=pp4,dp8"], ["dp 8 x pipeline microbatches 4 = 32", "--data.batch-size=32"]),
        (["--mesh=pp3", "--data.batch-size=12"], ["--model.embed=128", "fsdp 1 x pp 3 = 3", "--model.embed=132"]),
        (["--mesh=fsdp3", "--data.batch-size=12"], ["--model.embed=128", "fsdp 3 of mesh fsdp3", "--model.embed=132"]),
        (
            ["--mesh=tp3", "--model.heads=3", "--model.embed=96", "--model.mlp=513", "--model.vocabulary=2048"],
            ["2048 tokens", "tp 3", "use --model.vocabulary=2304 or tp"],
        ),
        (["--mesh=tp3"], ["--model.heads=4 does not divide by tp 3", "tp4"]),
        (["--mesh=tp4", "--model.mlp=510"], ["--model.mlp=510", "512"]),
        (
            ["--mesh=tp2", "--model.heads=6", "--model.kv-heads=3", "--model.embed=192"],
            ["--model.kv-heads=3", "use tp3"],
        ),
        (
            ["--mesh=cp2", "--data.sequence-length=250"],
            ["length=250", "2 x cp 2 = 4", "cp2", "use --data.sequence-length=2"],
        ),
        (["--mesh=cp4", "--context.method=allgather", "--data.sequence-length=20"], ["2 x cp 4 = 8", "allgather"]),
        (["--mesh=cp4", "--context.method=ulysses", "--data.sequence-length=30"], ["divide by cp 4", "length=32"]),
        (
            ["--mesh=dp2,tp4", "--context.sequence-parallel=on", "--data.sequence-length=30"],
            ["cp 1 x tp 4 = 4", "length=32", "parallel=auto"],
        ),
        (["--mesh=cp4,tp2", "--context.method=ulysses"], ["heads=4", "cp 4 x tp 2 = 8", "method=ring", "heads=8"]),
        (
            ["--model.experts=1"],
            ["--model.experts-per-token=2", "--model.experts=1", "use --model.experts-per-token=1"],
        ),
        (["--mesh=ep2"], ["ep 2", "--model.experts=0", "use --model.experts=8, or dp2"]),
        (["--mesh=ep4", "--model.experts=6"], ["--model.experts=6", "ep 4", "=8 or ep3"]),
        (
            ["--mesh=cp2", "--model.experts=4", "--model.capacity-factor=1.5"],
            ["--model.capacity-factor=1.5", "cp 2", "use --model.capacity-factor=0, or dp2"],
        ),
        (["--model.balance-rate=0.1", "--model.experts=4"], ["--model.balance-rate=0.1", "sigmoid"]),
        (["--model.balance-loss=0.1"], ["--model.balance-loss=0.1", "--model.experts"]),
        (["--mesh=dp3"], ["--data.batch-size=16", "dp 3 x microbatches 1 = 3", "15"]),
        (["--mesh=dp2,fsdp2", "--train.microbatches=3"], ["dp 2 x fsdp 2 x microbatches 3 = 12", "=12"]),
    ],
)
def test_what_cannot_work(argv, parts):
    with pytest.raises(UserError) as caught:
        check_run(*argv)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert len(message) < 400


def test_a_mesh_that_is_not_resolved_yet():
    config = load(RunConfig, ["--mesh=dp-1,tp2"])[0]
    check(config, mesh_spec.parse(config.mesh))
    config = load(RunConfig, ["--mesh=dp-1,tp3"])[0]
    with pytest.raises(UserError, match="tp 3"):
        check(config, mesh_spec.parse(config.mesh))


def test_the_cures_named_for_the_batch_and_the_heads_work():
    check_run("--mesh=dp2,fsdp2", "--train.microbatches=3", "--data.batch-size=12")
    check_run("--mesh=tp3", "--model.heads=3", "--model.embed=96", "--model.mlp=513")


def test_ranges_name_numbers_of_the_schema_and_the_defaults_pass():
    keys = kinds(RunConfig)
    values = dict(items(RunConfig()))
    named = [key for _, group in RANGES.values() for key in group]
    assert len(named) == len(set(named))
    assert set(named) <= set(keys)
    numbers = {key for key, value in values.items() if type(value) in (int, float)}
    assert numbers <= set(named), "every number has a range"


@pytest.mark.parametrize("text", ["10:13", "1:1"])
def test_profile_window(text):
    assert ":".join(map(str, profile_window(text))) == text


@pytest.mark.parametrize("text", ["", ":", "3", "5:4", "0:1", "a:b", "1:2:3", "-1:2", "1 :2", "²:3", "1:" + "9" * 50])
def test_profile_window_mistakes(text):
    with pytest.raises(UserError, match="first:last"):
        profile_window(text)
