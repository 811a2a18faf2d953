"""Whatever else is in flight, a request's codes are the plain path's, and its pictures nearly."""

from dataclasses import replace

import pytest
import torch
from diffusion_helpers import ONE_CODE_A_GROUP, random_tokenizer
from engine_helpers import (
    LONG,
    PICTURE,
    check_events,
    check_result,
    codes_request,
    collect,
    diffusion,
    held,
    idle,
    image_request,
    near,
    plain,
    until,
)
from hypothesis import given, settings
from request_mixes import check, mixes, pages_for, play

from dar_fast import DARPipeline
from dar_fast.config import PriorConfig
from dar_fast.engine import Engine, EngineConfig, Finished, Preview, RequestCancelledError
from dar_fast.models import Prior
from dar_fast.sampling import Sampling

Q, K = 4, 4


@settings(max_examples=25)
@given(mix=mixes())
def test_mixes_of_requests_are_drawn_as_by_the_plain_path(tiny_pipeline, mix):
    setting, asks = mix
    with engine_of(
        tiny_pipeline,
        max_requests=setting.max_requests, num_pages=pages_for(asks) + setting.spare_pages,
        diffusion_batch=setting.diffusion_batch, overlap=setting.overlap,
        deterministic=setting.deterministic, threads=setting.threads,
    ) as engine:  # fmt: skip
        handles = play(engine, asks)
        check(tiny_pipeline, asks, handles, PICTURE)
        idle(engine)


def engine_of(parts, **config):
    return Engine(parts.prior, parts.tokenizer, EngineConfig(**config))


@pytest.mark.parametrize("late", [1, 2, 3])
def test_requests_join_at_a_boundary(tiny_pipeline, make_engine, late):
    """One that comes while others are in their group `late` is drawn beside them from then on."""
    engine = make_engine()
    requests = [image_request(i, 20 + i, previews=True, num_steps=4 + i) for i in range(4)]
    run, batches, joined = engine._machine.lanes[0].runner.run, [], []

    def watched(rows):
        batches.append([(row.slot, row.position) for row in rows])
        if len(batches) == late:
            joined.extend(engine.submit(request) for request in requests[2:])
        return run(rows)

    with held(engine) as gate:
        gate.run = watched
        first = [engine.submit(request) for request in requests[:2]]
        gate.open.set()
        for handle in first:
            handle.result(LONG)
        handles = [*first, *joined]
        for handle, request in zip(handles, requests, strict=True):
            check_events(collect(handle), plain(tiny_pipeline, request), request, Q)
    assert any(len({position for _, position in batch}) > 1 for batch in batches)


@pytest.mark.parametrize("group", range(K))
@pytest.mark.parametrize("lane", ["tokens", "diffusion"])
def test_a_cancelled_request_leaves_its_batch_unchanged(tiny_pipeline, make_engine, group, lane):
    """It goes while its batch is being computed, at every boundary in turn."""
    engine = make_engine(max_requests=3)
    requests = [image_request(i, 30 + i, previews=True) for i in range(3)]
    owner, name = (
        (engine._machine.lanes[0].runner, "run")
        if lane == "tokens"
        else (diffusion(engine), "step")
    )
    work, calls, handles = getattr(owner, name), [], []

    def watched(rows):
        calls.append(len(rows))
        at = [getattr(row, "position", 0) // Q + getattr(row, "step", 0) for row in rows]
        if group in at and handles:
            handles[1].cancel()
        return work(rows)

    with held(engine) as gate:
        if lane == "tokens":
            gate.run = watched
        else:
            setattr(owner, name, watched)
        handles.extend(engine.submit(request) for request in requests)
        gate.open.set()
        for i in (0, 2):
            check_events(collect(handles[i]), plain(tiny_pipeline, requests[i]), requests[i], Q)
        with pytest.raises(RequestCancelledError):
            handles[1].result(LONG)
        idle(engine)
        again = engine.submit(requests[1])  # in a slot that was left half done
        check_events(collect(again), plain(tiny_pipeline, requests[1]), requests[1], Q)


def in_a_crowd(engine, request, others):
    """Its events while `others` are drawn beside it, all let go at once."""
    with held(engine) as gate:
        handles = [engine.submit(other) for other in others]
        handles.insert(1, engine.submit(request))
        gate.open.set()
        events = [collect(handle) for handle in handles]
    assert all(isinstance(e[-1], Finished) for e in events)
    return events[1]


CROWD = [
    image_request(i % 6, 90 + i, num_steps=3 + i, sampling=Sampling(guidance_scale=1.0 + i))
    for i in range(5)
]


@pytest.mark.parametrize(
    "setting", [{}, {"threads": 2}, {"overlap": False}, {"diffusion_batch": 2}]
)
def test_codes_are_equal_alone_and_in_a_full_batch(tiny_pipeline, make_engine, setting):
    engine = make_engine(max_requests=6, **setting)
    request = image_request(3, 8, previews=True, num_steps=6)
    alone = collect(engine.submit(request))
    crowded = in_a_crowd(engine, request, CROWD)
    assert alone[-1].result.codes.tolist() == crowded[-1].result.codes.tolist()
    check_events(alone, plain(tiny_pipeline, request), request, Q)
    check_events(crowded, plain(tiny_pipeline, request), request, Q)


@pytest.fixture(scope="module")
def one_code_a_group():
    """A model whose groups are so small that the library's products differ by batch."""
    tokenizer = random_tokenizer(ONE_CODE_A_GROUP)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        prior = Prior(
            PriorConfig(dim=32, depth=1, heads=2, vocab_size=64, num_tokens=4, num_classes=6)
        )
        torch.nn.init.normal_(prior.head.weight, std=0.1)
    return DARPipeline(prior, tokenizer)


def pictures(events):
    shown = [e.image for e in events if isinstance(e, Preview)]
    return torch.stack([*shown, events[-1].result.image])


@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic_pictures_are_the_same_bits_in_any_company(
    one_code_a_group, make_engine, threads
):
    """With the mode off they are not, of this model on this kind of machine (see `Diffusion`)."""
    request = image_request(3, 8, previews=True, num_steps=8)
    changed = {}
    for mode in (True, False):
        engine = make_engine(one_code_a_group, max_requests=6, deterministic=mode, threads=threads)
        alone = collect(engine.submit(request))
        wanted = pictures(alone)
        check_result(alone[-1].result, plain(one_code_a_group, request))
        runs = [in_a_crowd(engine, request, CROWD[:n]) for n in (1, 3, 5, 5)]
        assert all(r[-1].result.codes.equal(alone[-1].result.codes) for r in runs)
        changed[mode] = any(not pictures(run).equal(wanted) for run in runs)
        assert all(near(pictures(run), wanted) for run in runs)
    assert not changed[True]
    if threads == 1 and products_differ_by_batch(one_code_a_group.tokenizer):
        assert changed[False]


@pytest.mark.parametrize("total", [2, 3])
def test_deterministic_pictures_do_not_know_whether_codes_are_drawn(
    one_code_a_group, make_engine, total
):
    """Threads show in products of few rows, and an idle token lane leaves its own to the other."""
    engine = make_engine(one_code_a_group, deterministic=True, threads=total)
    request = image_request(3, 8, previews=True, num_steps=8)
    seen, threads = [], set()
    lane = diffusion(engine)
    step = lane.step
    lane.step = lambda rows: threads.add(torch.get_num_threads()) or step(rows)
    for busy in (False, True):
        with held(engine, "pictures") as steps:
            handle = engine.submit(request)
            until(lambda due=K * (1 + busy): engine.stats().groups == due)
            steps.wait()
            with held(engine) as tokens:
                if busy:
                    other = engine.submit(codes_request())
                    tokens.wait()
                steps.open.set()
                seen.append(pictures(collect(handle)))
            if busy:
                other.result(LONG)
    assert seen[0].equal(seen[1])
    assert len(threads) == 1


@torch.no_grad()
def products_differ_by_batch(tokenizer):
    """Whether this machine's library sums a row's products in another order beside others."""
    layer = tokenizer.token_decoder
    rows = torch.randn(
        6, 4, tokenizer.config.decoder_dim, generator=torch.Generator().manual_seed(0)
    )
    return not all(layer(rows)[i].equal(layer(rows[i : i + 1])[0]) for i in range(6))


def test_the_embedded_model(make_engine, demo):
    c = demo.tokenizer.config
    engine = make_engine(demo, max_requests=3, diffusion_batch=2)
    requests = [
        image_request(3, 0, previews=True),
        image_request(10, 1, sampling=Sampling(guidance_scale=(1.0, 6.0), top_k=100), num_steps=5),
        image_request(20, 2, num_groups=5, previews=True, prefix_codes=list(range(c.group_size))),
        codes_request(30, 3, sampling=Sampling(guidance_scale=1.0), previews=True),
    ]
    handles = [engine.submit(request) for request in requests]
    fork = engine.fork(handles[0], 3, seed=9, label=11)
    for handle, request in zip(handles, requests, strict=True):
        check_events(collect(handle), plain(demo, request), request, c.group_size)
    given = plain(demo, requests[0]).codes[: 3 * c.group_size].tolist()
    asked = replace(requests[0], seed=9, label=11, prefix_codes=given)
    check_events(collect(fork), plain(demo, asked, 0), asked, c.group_size)
    idle(engine)


@pytest.fixture(scope="module")
def demo():
    return DARPipeline.from_pretrained("demo", device="cpu")


def test_bf16(make_engine, fresh_pipeline):
    """Codes are those of the native decode step in bf16; pictures agree to what bf16 resolves."""
    parts = fresh_pipeline.to(dtype=torch.bfloat16)
    engine = make_engine(parts, max_requests=3)
    requests = [image_request(i, i, previews=True, num_steps=4 + i) for i in range(5)]
    handles = [engine.submit(request) for request in requests]
    for handle, request in zip(handles, requests, strict=True):
        wanted = plain(parts, request, implementation=None)
        check_events(collect(handle), wanted, request, Q, 2e-2)
