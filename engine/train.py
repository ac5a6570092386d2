"""A training run, top to bottom: this file is the table of contents, each call says which file to open.

    python -m engine.train recipes/quickstart.yaml                               one process
    torchrun --nproc_per_node=8 -m engine.train recipes/llama2_7b_lora.yaml      one rank per GPU
    ./torchrun.sh recipes/quickstart.yaml optim.lr=1e-3                          the same, environment included

A *step* is one update of the weights from one global batch of sequences; a *micro-batch* is what one rank computes at
once; *targets* are the supervised tokens, the ones that carry loss.
"""

import math
from functools import partial
from pathlib import Path

from engine import config, errors
from engine.signals import StopRequest


def main(argv: list[str]) -> int:
    # ---- Recipe: every mistake in it is reported here, before torch takes its seconds to import ---------------------
    cfg, stop = config.load(argv), StopRequest()

    from engine import adapter, blackbox, checkpoint, distributed, export, hub, metrics, optim, precision, report, restarts, rundir
    from engine.attention import PackedAttention
    from engine.attention import choose as choose_attention
    from engine.data import added_tokens, changes, chat_template, checks, dataset, ledger, loader, view
    from engine.data.plan import Plan
    from engine.data.tokenizer import load_tokenizer
    from engine.dropout import DropoutKeys
    from engine.evaluate import Evaluation
    from engine.loss import summed_cross_entropy
    from engine.models import weights
    from engine.saver import Saver
    from engine.stragglers import Stragglers

    # ---- Run directory: a finished one is left alone, an unfinished one resumes from its newest whole checkpoint --
    run, rank = rundir.choose(cfg), errors.rank_in_launch()
    with (stop, rundir.locked(run, rank), Saver(run / "checkpoints", cfg.checkpoint, rank == 0) as saver,
          errors.recorded(run / "last_error.json", rank), distributed.losses_told()):
        newest = checkpoint.newest_whole(run / "checkpoints") if rank == 0 else None

        # ---- Data: tokenised, packed and checked before ranks wait for each other -----------------------------------
        base = hub.resolve(cfg.model.path, cfg.model.init == "pretrained", rundir.commit_of_base(run, cfg.model.path))
        source, tokenizer_folder = base.folder, added_tokens.extend(base.folder, cfg.model.add_tokens, Path(cfg.data.cache))
        tokenizer, model_config = load_tokenizer(tokenizer_folder), weights.read_config(source)
        rows, held_out = (dataset.load(cfg.data, of, tokenizer, cfg.train.seed) for of in ("train", "validation"))
        dataset.check_fit(rows, held_out, tokenizer, model_config, len(cfg.model.add_tokens))
        checks.before_training(rows, held_out, cfg.data, speaks=rank == 0)
        if rank == 0:
            chat_template.check(source, cfg.data, tokenizer, rows.first_row())
            export.check(cfg, source, tokenizer_folder)
        plan = Plan(rows.lengths, rows.targets, cfg.data.max_length, cfg.train.global_batch, cfg.data.packing,
                    cfg.data.shuffle, cfg.train.seed, cfg.train.epochs, rows.skipped)
        num_steps = min(plan.num_steps, cfg.train.max_steps or plan.num_steps)

        # ---- Processes ----------------------------------------------------------------------------------------------
        world = distributed.init(cfg.train.device, cfg.train.timeout_s, cfg.train.deterministic)
        device = world.device
        stop.ranks_agree()
        base.check_same(distributed.gather_text(base.commit or "", world))

        # ---- Model: trained weights are fp32 unless the optimizer takes bf16, frozen ones as the recipe says --------
        frozen = precision.DTYPES[cfg.model.dtype] if cfg.lora.used else None
        types = precision.choose(cfg.train.precision, frozen, device)
        keys = DropoutKeys(cfg.train.seed)
        model = weights.build(source, cfg.model.init, cfg.train.seed, precision.DTYPES[cfg.model.dtype], types.residual, device,
                              cfg.train.activation_checkpointing, cfg.model.dropout, keys)
        attention, why_attention = choose_attention(cfg.train.attention, device, types.arithmetic, model.config)
        weights.add_rows(model, tokenizer.size - len(cfg.model.add_tokens), tokenizer.size)
        adapter.attach(model, cfg.lora, keys, cfg.train.seed)
        kept = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad or ".lora_" in name}  # PiSSA's start with it
        trained = {name: parameter for name, parameter in kept.items() if parameter.requires_grad}

        # ---- Optimizer and loss scale -------------------------------------------------------------------------------
        optimizer, why_optimizer = optim.build(trained, cfg.optim, cfg.train.seed, world)
        scale = precision.LossScale(cfg.train.precision == "fp16", cfg.train.loss_scale, cfg.train.loss_scale_growth)

        # ---- Resume: data position, learning rate and dropout follow from the step, so they need no saving ----------
        identity = {**config.semantic(cfg), "data": rows.digest, "tokenizer": tokenizer.digest,
                    "weights": weights.identity(model, source, cfg.model.init),
                    "adapter": adapter.digest(Path(cfg.lora.start)) if cfg.lora.start else None}
        distributed.check_same({**config.shared(cfg), **identity, **rundir.program(), "data.validation": held_out and held_out.digest,
                                "attention in use": attention}, world)
        start, best, counted, seen, owed = distributed.from_first(newest or 0, world), {"step": None, "loss": math.inf}, ledger.Counts(), {}, None
        if start:
            with checkpoint.opened(run / "checkpoints", start, verify=world.local_rank == 0 < world.rank) as saved:  # rank 0 has done it
                changed = checkpoint.compare_identity(run / "checkpoints", saved.state, identity, cfg.resume.allow, rows, world.is_first)
                weights.load_kept(kept, saved.model)
                optim.load_state(optimizer, trained, saved.optimizer)
                scale.load(scale.state() if "train.precision" in changed else saved.state["scale"])
                best, seen, owed = saved.state["best"], saved.state["losses"], held_out and saved.state.get("owed")
                counted = ledger.go_on(plan, start, saved.state, changed)

        # ---- Wrap: ddp_model runs forward in training, model is for all else ----------------------------------------
        ddp_model = distributed.wrap(model.train(), world)

        def forward(batch, step: int, by_source=None):
            """Sum of the negative log-likelihoods of a micro-batch's targets, fp32; adds each source's part to `by_source`."""
            keys.set(step, batch.places, batch.lengths)
            with types.context():
                hidden = ddp_model(batch.ids, batch.positions, PackedAttention(batch.documents, device, attention))
                return summed_cross_entropy(hidden[batch.at], model.lm_head.weight, batch.targets, batch.sources, by_source)

        distributed.settle(ddp_model, lambda: forward(loader.empty(device), 0))

        # ---- What will happen, in words and as an equation ----------------------------------------------------------
        flops, (peak, peak_source) = metrics.Flops(model), metrics.peak_flops(device)
        facts = report.facts(model, world, {"attention": f"{attention}: {why_attention}", "precision": types.reason, "optimizer": why_optimizer,
                                            "peak": peak_source, "utilisation": metrics.utilisation(device)[1]})
        log = metrics.Log(run, start, num_steps, cfg.log.every_steps, cfg.log.tensorboard, world.is_first, again=bool(owed))
        if world.is_first:
            checkpoint.prepare(run / "checkpoints", start, model, kept, cfg, num_steps, plan.steps_per_epoch)
            rundir.describe(run, cfg, {"base": {"name": cfg.model.path, "commit": base.commit}, **facts, **identity}, start)
            ledger.write(run, rows, held_out, plan, start, counted)
        log.say(report.equation(run, cfg, base, plan, rows, num_steps, start, world.size, facts))
        log.text("recipe", f"attention {facts['attention']}\n\n```\n{config.dump(cfg)}```", 0)
        log.text("rows", view.as_markdown(rows, tokenizer, 3), 0)
        evaluation = Evaluation(held_out, tokenizer, cfg.data, cfg.evaluate, attention, types, world) if held_out else None
        judged = evaluation.run(model, whole=start == num_steps) if evaluation and (owed or (start == 0 and cfg.evaluate.at_start)) else None
        if judged:
            log.step(start, {**(owed or {}), **judged.scalars})
            best = checkpoint.best_of(best, judged.loss, start)
        boxes = blackbox.Recorder(run, cfg, saver, world, rows, tokenizer, trained, scale, ddp_model, forward, seen)

        # ---- Loop ---------------------------------------------------------------------------------------------------
        watch, stragglers = metrics.Stopwatch(device), Stragglers(world)
        steps = loader.Loader(rows, plan, world.rank, world.size, cfg.train.micro_batch, flops.of, device, start, num_steps)
        for step, batches in watch.waiting("data", steps):
            number, lr = step.number, optim.learning_rate(step.number, num_steps, cfg.optim)
            optim.set_learning_rate(optimizer, lr)

            # The mean over all targets of the global batch: each micro-batch contributes its sum over their number. DDP
            # averages gradients over ranks where we want their sum, hence the world's size.
            losses = metrics.zeros(len(rows.sources), device)
            for batch in batches:
                with distributed.sync_if(ddp_model, batch is batches[-1]):
                    loss = forward(batch, number, losses)
                    watch.lap("forward")
                    (loss * (scale.value * world.size / (step.num_targets or 1))).backward()
                    watch.lap("backward")

            # Ranks agree on the losses, on having trained every document of the step once, on whether to stop and whether to save.
            *losses, asked, timed, documents, numbers, tokens, targets = stragglers.noted(distributed.sum_over_ranks(
                [*losses.tolist(), stop.asked, saver.is_due(), *ledger.Counts.of(batches), *stragglers.own(watch, batches)], world))
            counted += ledger.as_planned(step, (documents, numbers, tokens, targets))
            norm = optim.gradient_norm(trained.values(), scale.value)
            finite, used_scale = math.isfinite(sum(losses)) and math.isfinite(norm), scale.value
            noted, advice = boxes.look(step, batches, losses, norm, finite)
            scale.update(finite, number + 1, advice)  # raises unless a skipped step can help
            if finite and step.num_targets:  # data.skip can leave none
                optim.unscale_and_clip(trained.values(), norm, used_scale, cfg.optim.clip_norm)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            watch.lap("optimizer")

            done, times = number + 1, watch.read()
            scalars = {"train/lr": lr, "train/grad_norm": norm, "train/loss_scale": used_scale, **noted,
                       "train/epoch": done / plan.steps_per_epoch, **metrics.of_step(rows, step, losses, times, flops, peak * world.size, device)}

            # Evaluate, copy, log, save: each at its period, at ends of epochs, and at the end or a request to stop, which owes an evaluation.
            leaving = done == num_steps or asked
            judges = evaluation and (done == num_steps or due(cfg.evaluate, done, step))
            judged = evaluation.run(model, whole=done == num_steps) if judges and not asked else None
            scalars |= judged.scalars if judged else {}
            if leaving or timed or due(cfg.checkpoint, done, step):
                best = checkpoint.best_of(best, judged and judged.loss, done)
                state = {"identity": identity, "scale": scale.state(), "best": best, "trained": counted, "skips": plan.skips,
                         "files": changes.table(rows), "losses": boxes.state(), "owed": scalars if judges and asked else None}
                scalars["time/checkpoint"] = saver.take(done, kept, optimizer, state, world)
            log.step(done, scalars)
            saver.write(leaving, log.settle, partial(ledger.write, run, rows, held_out, plan, done, counted))  # in the background
            if asked:
                log.say(f"stopped as asked after step {done}, saved; the same command resumes from there")
                log.close()
                distributed.close(world)
                return restarts.stopped(run)

        # ---- End: weights for others, and what to look at ------------------------------------------------------------
        if evaluation and judged is None:  # resumed after the last step
            judged = evaluation.run(model, whole=True)
        exported = export.Exporter(model, cfg, held_out or rows, types, base, tokenizer_folder).run(run / "export") if world.is_first else {}
        frozen_digest = weights.identity(model, source, cfg.model.init) if world.is_first and cfg.lora.used else None
        assert frozen_digest in (None, identity["weights"]), "frozen weights have changed"
        log.hparams(cfg, judged.scalars if judged else {})
        log.text("samples", report.samples(judged), num_steps)
        log.say(report.closing(run, judged, exported, frozen_digest))
        log.close()
        distributed.close(world)
        if world.is_first:  # now that no rank can fail any more
            rundir.finish(run, judged.scalars if judged else {})
    return errors.DONE


def due(period, done: int, step) -> bool:
    """Whether something with `every_steps` and `each_epoch` falls on the step that is now done."""
    return bool((period.every_steps and done % period.every_steps == 0) or (period.each_epoch and step.is_last_of_epoch))


if __name__ == "__main__":
    errors.run(main, needs_reader=False)  # `| head` is no wish to stop
