"""The field's own bugs, planted one at a time in a copy of the repository: each must turn a test red.

    ./tests/run.sh --mutations [WORD ...]        all of them, or those whose name holds one of the words

A bug is a piece of a file and what takes its place; the tests beside it are those that are there for it. They are run without
any bug first. `tests/test_mutations.py` sees that every piece and every test is still there.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Bug:
    """`old` stands once in `file`; with `new` in its place one of `tests` (file::function, or a name with its parameters) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


TRAIN, PLAN, LOADER, CHECKPOINT = "engine/train.py", "engine/data/plan.py", "engine/data/loader.py", "engine/checkpoint.py"
SPLIT = "tests/test_gradient.py::test_every_split_gives_the_gradient_of_the_whole_batch"
RESUME = "tests/test_resume.py::test_killed_and_resumed_equals_undisturbed"
TEMPLATE = "tests/test_data.py::test_prompt_is_tokenised_alike_in_training_and_generation_and_the_end_is_supervised_once"

BUGS = [
    # ---- the loss and its gradient
    Bug("mean of micro-batch means", TRAIN,
        "(loss * (scale.value * world.size / (step.num_targets or 1))).backward()",
        "(loss * (scale.value / len(batches) / max(1, len(batch.targets)))).backward()",
        SPLIT),
    Bug("gradients divided by the ranks", TRAIN,
        "scale.value * world.size / (step.num_targets or 1)",
        "scale.value / (step.num_targets or 1)",
        SPLIT),
    Bug("padding counted as targets", LOADER,
        "supervised.append(np.zeros(padding, dtype=bool))",
        "supervised.append(np.ones(padding, dtype=bool))",
        "tests/test_loader.py::test_packed_sequences_have_one_shape_and_padding_is_a_document_without_targets"),
    Bug("gradients never exchanged", "engine/distributed.py",
        "return _finished_exchange(ddp_model.device) if last else ddp_model.no_sync()",
        "return ddp_model.no_sync()",
        SPLIT),
    Bug("one micro-batch too many without exchange", TRAIN,
        "batch is batches[-1]",
        "batch is batches[0]",
        SPLIT),
    Bug("the last batch of an epoch dropped", PLAN,
        "self.steps_per_epoch = -(-self.sequences_per_epoch // global_batch)",
        "self.steps_per_epoch = max(1, self.sequences_per_epoch // global_batch)",
        "tests/test_plan.py::test_each_epoch_holds_every_document_once_and_no_sequence_is_too_long"),
    Bug("targets not shifted", LOADER,
        "tensor(tokens[at + 1])",
        "tensor(tokens[at])",
        "tests/test_loader.py::test_targets_are_the_next_token_of_the_same_document"),
    Bug("the first token of a document predicted from the one before it", LOADER,
        " & (positions[1:] > 0)",
        "",
        "tests/test_loader.py::test_nothing_is_predicted_across_documents"),
    Bug("positions go on across documents", LOADER,
        "positions = np.arange(len(tokens)) - np.repeat(np.cumsum(documents) - documents, documents)",
        "positions = np.arange(len(tokens))",
        "tests/test_loader.py::test_targets_are_the_next_token_of_the_same_document"),
    Bug("attention across documents", "engine/attention.py",
        "mask = (self.document[:, None] == self.document) & _visible",
        "mask = _visible",
        "tests/test_model.py::test_packed_logits_equal_each_document_alone"),
    Bug("validation as a mean of means", "engine/evaluate.py",
        "counts += torch.bincount(batch.sources, minlength=len(names))",
        "counts += torch.bincount(batch.sources, minlength=len(names)).clamp(max=7)",
        "tests/test_metrics.py::test_validation_loss_is_the_mean_over_supervised_tokens"),
    # ---- rows, tokens, order
    Bug("the end of an answer is not learnt", "engine/data/template.py",
        "Segment(EOS, True, turn)]\n        else:\n            middle = f",
        "Segment(EOS, True)]\n        else:\n            middle = f",
        TEMPLATE),
    Bug("questions are learnt", "engine/data/tokenizer.py",
        "masks.append(not begins and (around if turn is None else wanted[turn]))",
        "masks.append(not begins and (around if turn is None else True))",
        TEMPLATE),
    Bug("control tokens in text", "engine/data/tokenizer.py",
        "            model.encode_special_tokens = True\n        self.memo",
        "            model.encode_special_tokens = False\n        self.memo",
        "tests/test_data.py::test_control_tokens_in_a_row_stay_text"),
    Bug("every epoch in one order", PLAN,
        "key = np.uint64(mix(self.seed, epoch))",
        "key = np.uint64(mix(self.seed, 0))",
        "tests/test_plan.py::test_epochs_and_seeds_have_orders_of_their_own"),
    Bug("each rank its own slice, the rest left out", PLAN,
        "places[rank].append(place)",
        "places[rank].append(place) if place < len(costs) // size * size else None",
        "tests/test_plan.py::test_ranks_share_all_places_of_a_step"),
    Bug("a resume begins its epoch again", TRAIN,
        "flops.of, device, start, num_steps)",
        "flops.of, device, start // plan.steps_per_epoch * plan.steps_per_epoch, num_steps)",
        "tests/test_resume.py::test_asked_to_stop_saves_and_goes_on"),
    Bug("a cache that does not know the template", "engine/data/build.py",
        'parts = {**asdict(self), "tokenizer"',
        'parts = {"format": self.format, "tokenizer"',
        "tests/test_dataset.py::test_what_decides_the_ids_is_in_the_key"),
    # ---- precision and the optimizer
    Bug("clipped before it is unscaled", "engine/optim.py",
        "_foreach_norm(grads, dtype=torch.float32)))) / scale",
        "_foreach_norm(grads, dtype=torch.float32))))",
        "tests/test_optim.py::test_gradients_are_unscaled_and_shortened_as_torch_does"),
    Bug("a step with an infinity is taken", TRAIN,
        "            if finite and step.num_targets:",
        "            if step.num_targets:",
        "tests/test_precision.py::test_an_infinity_on_one_rank_skips_the_step_on_all_and_halves_the_scale"),
    Bug("norms and biases decay", "engine/optim.py",
        "cfg.weight_decay if parameter.dim() >= 2 else 0.0",
        "cfg.weight_decay",
        "tests/test_optim.py::test_matrices_decay_and_vectors_do_not"),
    Bug("the schedule ends early", "engine/optim.py",
        "(step - warmup) / max(1, num_steps - warmup)",
        "step / max(1, num_steps - warmup)",
        "tests/test_optim.py::test_schedules_at_named_points"),
    Bug("LoRA scaled by its rank twice", "engine/lora.py",
        "alpha / (math.sqrt(rank) if rslora else rank)",
        "alpha / (math.sqrt(rank) if rslora else rank * rank)",
        "tests/test_lora.py::test_peft_computes_the_same_from_the_saved_adapter"),
    Bug("LoRA's B begins at random", "engine/lora.py",
        "nn.Parameter(torch.zeros(base.out_features, rank, device=device))",
        "nn.Parameter(torch.randn(base.out_features, rank, device=device))",
        "tests/test_lora.py::test_identity_at_start"),
    Bug("rotary pairs lie side by side", "engine/attention.py",
        "first, second = x.chunk(2, dim=-1)",
        "first, second = x[..., ::2], x[..., 1::2]",
        "tests/test_families.py::test_logits_and_every_gradient_equal_transformers"),
    # ---- randomness and resume
    Bug("masks of dropout do not know the step", TRAIN,
        "keys.set(step, batch.places, batch.lengths)",
        "keys.set(0, batch.places, batch.lengths)",
        "tests/test_verify.py::test_holds_on_the_engine"),
    Bug("masks of dropout follow a stream", "engine/dropout.py",
        "generator.manual_seed(mix(keys.seed, keys.step, place, self.number) >> 1)",
        "generator.manual_seed(int(torch.randint(1 << 30, ()))) if place else generator.manual_seed(0)",
        "tests/test_resume.py::test_dropout_does_not_depend_on_the_split"),
    Bug("moments are not restored", TRAIN,
        "                optim.load_state(optimizer, trained, saved.optimizer)\n",
        "",
        RESUME),
    Bug("the loss scale is not restored", "engine/precision.py",
        'self.value, self.good_steps = float(state["value"]), int(state["good_steps"])',
        "pass",
        "tests/test_precision.py::test_the_scale_grows_halves_and_comes_back_from_a_checkpoint"),
    Bug("DDP's buckets move after the first step", TRAIN,
        "        distributed.settle(ddp_model, lambda: forward(loader.empty(device), 0))\n",
        "",
        "tests/test_resume.py::test_first_step_after_a_resume_has_the_bucket_layout_of_later_steps"),
    Bug("another recipe goes on with a run", CHECKPOINT,
        "                 if saved.get(key) != current.get(key)}",
        "                 if False}",
        "tests/test_resume.py::test_a_changed_recipe_is_refused_by_name"),
    Bug("SIGTERM swallowed", "engine/signals.py",
        "self.asked = True",
        "pass",
        "tests/test_resume.py::test_asked_to_stop_saves_and_goes_on"),
    Bug("steps twice in metrics.jsonl", "engine/record.py",
        "if 0 <= json.loads(line)[\"step\"] <= last:",
        "if json.loads(line)[\"step\"] >= 0:",
        RESUME),
    Bug("steps twice in TensorBoard", "engine/events.py",
        "purge_step=last + 1",
        "purge_step=None",
        RESUME),
    Bug("a stop evaluates before it saves", TRAIN,
        "if judges and not asked else None",
        "if judges else None",
        "tests/test_preemption.py::test_a_stop_saves_before_an_evaluation_that_is_due_and_the_next_launch_makes_up_for_it"),
    Bug("PiSSA's start is found anew at each launch", TRAIN,
        'parameter.requires_grad or ".lora_" in name}',
        "parameter.requires_grad}",
        "tests/test_resume.py::test_pissas_start_is_state_and_is_found_once"),
    Bug("a resume holds what it has read", "engine/optim.py",
        "            value = tensors[key]\n",
        "            value = tensors[key]\n            globals().setdefault('kept', []).append(tensors[key])\n",
        "tests/test_resume.py::test_a_resumed_run_holds_no_more_than_one_that_was_not_stopped"),
    Bug("a run that fails leaves its save behind", "engine/saver.py",
        "PATIENCE_S = 300.0",
        "PATIENCE_S = 0.1",
        "tests/test_saver.py::test_a_failure_costs_no_save_that_is_in_flight_and_peers_do_not_wait_for_it"),
    Bug("every black box holds a checkpoint", "engine/blackbox.py",
        "            shutil.rmtree(older)\n",
        "            pass\n",
        "tests/test_blackbox.py::test_a_spike_is_told_written_down_and_trained_through"),
    # ---- checkpoints
    Bug("no fsync", CHECKPOINT,
        "        for path in building.iterdir():\n            fsync(path)\n",
        "",
        "tests/test_checkpoint.py::test_files_are_synced_before_the_rename_and_the_parent_after"),
    Bug("the older one goes before the new one is there", CHECKPOINT,
        "        os.rename(building, target)\n",
        "        [shutil.rmtree(folder / f'step-{n:09d}') for n in steps_in(folder)]\n        os.rename(building, target)\n",
        "tests/test_checkpoint.py::test_older_checkpoints_stay_until_the_new_one_was_read_again"),
    Bug("a new one is not read again", CHECKPOINT,
        "if problem := damage(target):",
        "if problem := None:",
        "tests/test_checkpoint.py::test_older_checkpoints_stay_until_the_new_one_was_read_again"),
    Bug("names that only begin like a checkpoint's", CHECKPOINT,
        "NAME.fullmatch(entry.name)",
        "NAME.search(entry.name)",
        "tests/test_storage.py::test_what_is_only_nearly_named_like_a_checkpoint_is_never_considered"),
    Bug("a manifest is enough", CHECKPOINT,
        "        for name in FILES:\n            size =",
        "        for name in ():\n            size =",
        "tests/test_checkpoint.py::test_a_damaged_checkpoint_is_passed_over_with_one_warning"),
    Bug("sizes are enough", CHECKPOINT,
        '            if (found := _sha256(path / name)) != files[name]["sha256"]:',
        '            if (found := ""):',
        "tests/test_checkpoint.py::test_a_damaged_checkpoint_is_passed_over_with_one_warning"),
    Bug("damage all over is a fresh start", CHECKPOINT,
        '    if damaged:\n        raise EngineError("CHECKPOINT-NONE"',
        '    if False:\n        raise EngineError("CHECKPOINT-NONE"',
        "tests/test_checkpoint.py::test_history_without_a_whole_checkpoint_is_no_fresh_start"),
    Bug("the best one is removed", CHECKPOINT,
        "        if number != best:\n",
        "        if True:\n",
        "tests/test_checkpoint.py::test_keeps_the_newest_and_the_best"),
    Bug("pickle in a checkpoint", CHECKPOINT,
        "            yield Snapshot(model, ",
        "            __import__('pickle').loads(__import__('pickle').dumps(Snapshot))\n            yield Snapshot(model, ",
        "tests/test_checkpoint.py::test_training_and_resume_never_unpickle"),
    # ---- ranks
    Bug("ranks that hold other rows train together", "engine/distributed.py",
        "if others := [rank for rank, one in enumerate(found) if one.get(name) != found[0].get(name)]:",
        "if others := []:",
        "tests/test_dataset.py::test_ranks_that_read_different_rows_do_not_train_together"),
    Bug("replicas that differ are saved", "engine/saver.py",
        "        distributed.check_replicas(kept, world)\n",
        "",
        "tests/test_blackbox.py::test_a_bit_that_flips_on_one_rank_is_caught_at_the_next_checkpoint_and_costs_its_steps_alone"),
    Bug("a save writes what the loop goes on changing", "engine/saver.py",
        "return {name: self.buffers[name] for name in tensors}",
        "return dict(tensors)",
        "tests/test_saver.py::test_what_is_written_is_the_state_of_one_step_although_the_loop_went_on"),
    Bug("a lost peer is told as a bug", "engine/distributed.py",
        "if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and \"gloo\" in str(error)):",
        "if False:",
        "tests/test_watchdog.py::test_a_killed_rank_is_named_by_each_of_the_others_within_five_seconds"),
    Bug("a row that is skipped is computed", LOADER,
        "there = int(document) not in skipped",
        "there = True",
        "tests/test_skip.py::test_the_gradient_is_that_of_the_batch_without_the_row"),
    Bug("a fresh window of losses after a resume", TRAIN,
        "saved.state[\"losses\"]",
        "{}",
        "tests/test_blackbox.py::test_the_losses_that_a_spike_is_judged_by_outlive_a_resume"),
    Bug("two runs in one folder", "engine/rundir.py",
        "        lock_now(lock)\n",
        "",
        "tests/test_storage.py::test_a_second_run_in_the_same_place_is_refused_and_told_who_is_there"),
    # ---- ranks that hang, other identities, hostile input
    Bug("a rank that moves no more is never late", "engine/watchdog.py",
        "(beat.age + self.silence(other) > self.timeout_s and (beat.exchanges, beat.marks) < (now.exchanges, now.marks))",
        "False",
        "tests/test_watchdog.py::test_a_rank_that_stands_still_is_named[stuck-3-2-1-forward]"),
    Bug("a rank that is heard no more is never late", "engine/watchdog.py",
        "self.silence(other) > self.timeout_s or",
        "",
        "tests/test_watchdog.py::test_a_rank_that_stands_still_is_named[stopped-3-2-1-inside]"),
    Bug("a rank that is dead is not missed", "engine/errors.py",
        "except (ProcessLookupError, OverflowError):\n        return True",
        "except (ProcessLookupError, OverflowError):\n        return False",
        "tests/test_watchdog.py::test_a_killed_rank_is_named_though_no_connection_tells"),
    Bug("what the machine cannot read is damage", CHECKPOINT,
        "isinstance(error, OSError) and error.errno in OF_THE_MACHINE",
        "False",
        "tests/test_checkpoint.py::test_what_the_machine_cannot_read_now_is_not_taken_for_damage"),
    Bug("room for a save that has been made", "engine/space.py",
        "{num_steps} if start < num_steps else set()",
        "{num_steps}",
        "tests/test_storage.py::test_room_is_asked_for_as_many_checkpoints_as_will_lie_there_at_once"),
    Bug("every option may differ on resume", "engine/config.py",
        "for key, value in flat(recipe).items() if not key.startswith(HARDWARE)}",
        "for key, value in flat(recipe).items() if key.startswith('run.name')}",
        "tests/test_identity.py::test_every_key_either_decides_a_run_or_may_differ"),
    Bug("a spike is looked for among no losses", "engine/blackbox.py",
        "spike, lost = 0 < self.spike_z < deviations,",
        "spike, lost = False,",
        "tests/test_blackbox.py::test_a_spike_is_told_written_down_and_trained_through"),
    Bug("templates outside of the sandbox", "engine/data/sandbox.py",
        "    made = ImmutableSandboxedEnvironment(",
        "    from jinja2 import Environment\n    made = Environment(",
        "tests/test_templates.py::test_a_hostile_template_is_refused"),
    Bug("an index names files anywhere", "engine/models/weights.py",
        "Path(name).name != name or ",
        "",
        "tests/test_security.py::test_an_index_names_files_beside_it_alone"),
    Bug("a header of any length is read", "engine/tensorfile.py",
        "        if length > most:",
        "        if False:",
        "tests/test_security.py::test_hostile_weights_are_refused_wherever_they_lie"),
    Bug("tensors may overlap in a file", "engine/tensorfile.py",
        "            if entry.begin != at:",
        "            if False:",
        "tests/test_security.py::test_hostile_weights_are_refused_wherever_they_lie"),
    Bug("files that anybody may read", "engine/terminal.py",
        "os.umask(0o077)",
        "os.umask(0o022)",
        "tests/test_security.py::test_what_a_run_writes_is_its_owners_alone"),
    Bug("one node listens to all the world", "engine/distributed.py",
        "socket_of_one_node = socket.create_server((\"127.0.0.1\", port)).detach() if holds and on_one_node else None",
        "socket_of_one_node = socket.create_server((\"\", port)).detach() if holds and on_one_node else None",
        "tests/test_security.py::test_one_node_listens_on_loopback_alone"),
    # ---- starting and stopping
    Bug("keys of a start that is gone", "engine/distributed.py",
        "len(found) == size and found[rank] == own_word and found[0] != start",
        "len(found) == size and found[0] != start",
        "tests/test_meeting.py::test_a_start_knows_nothing_of_those_before_it"),
    Bug("the first rank publishes once", "engine/distributed.py",
        "if rank == 0 and store.check(words):",
        "if rank == 0 and store.check(words) and not store.check([\"meeting\"]):",
        "tests/test_meeting.py::test_a_start_knows_nothing_of_those_before_it"),
    Bug("torch waits where no signal is heard", "engine/distributed.py",
        "making = ThreadPoolExecutor(1).submit(dist.TCPStore, address, port, size, holds, timedelta(seconds=patience), wait_for_workers=False,\n"
        "                                              master_listen_fd=socket_of_one_node)\n        return making.result(patience)",
        "return dist.TCPStore(address, port, size, holds, timedelta(seconds=patience), wait_for_workers=False, master_listen_fd=socket_of_one_node)",
        "tests/test_meeting.py::test_a_rank_that_waits_for_the_first_one_obeys_a_stop"),
    Bug("nobody watches while the group is made", "engine/distributed.py",
        "            _watchdogs[-1].start()\n",
        "",
        "tests/test_meeting.py::test_a_rank_that_goes_while_the_group_is_made_is_named_by_the_others"),
    Bug("a GPU that fails is our bug", "engine/distributed.py",
        "elif isinstance(error, RuntimeError) and any(words in text for words in OF_GPU)",
        "elif False and any(words in text for words in OF_GPU)",
        "tests/test_meeting.py::test_a_gpu_that_fails_is_the_machines_fault_and_a_wrong_kernel_is_ours"),
    Bug("ranks on other processors train together", "engine/distributed.py",
        "    facts = {**_computes_on(world.device), **facts}\n",
        "",
        "tests/test_environment.py::test_ranks_of_another_program_do_not_train_together"),
    Bug("a resume with other code is silent", "engine/rundir.py",
        ", \"engine\": (before.get(\"engine\"), record[\"engine\"])",
        "",
        "tests/test_identity.py::test_other_arithmetic_is_one_warning"),
    Bug("a restart undoes a stop", "engine/restarts.py",
        "if (run / \"stopped\").exists():",
        "if False:",
        "tests/test_restarts.py::test_a_stop_is_not_undone_by_a_restart_but_by_the_next_launch"),
    Bug("a stop outlives its launch", "engine/restarts.py",
        "for path in (note, run / \"stopped\") if rank == 0 else ():",
        "for path in (note,) if rank == 0 else ():",
        "tests/test_restarts.py::test_a_stop_is_not_undone_by_a_restart_but_by_the_next_launch"),
    Bug("the first rank alone is told that a restart is in vain", "engine/rundir.py",
        "        restarts.check(path, rank)\n        yield\n        return",
        "        yield\n        return",
        "tests/test_restarts.py::test_what_a_restart_cannot_mend_ends_it_at_once_with_the_same_code"),
    Bug("a launcher that starts again whatever it was", "engine/launch.py",
        "            agent._remaining_restarts = 0\n",
        "            pass\n",
        "tests/test_launch.py::test_what_a_restart_would_undo_or_cannot_mend_is_not_started_again"),
    Bug("a launch that waits for nodes hears no stop", "engine/launch.py",
        "threading.Thread(target=listen, daemon=True).start()",
        "pass",
        "tests/test_launch.py::test_a_launch_that_waits_for_another_node_obeys_a_stop"),
    Bug("torchrun's thirty seconds for a save", "engine/launch.py",
        "timeout, left = max(timeout, PATIENCE_S + 30),",
        "timeout, left = timeout,",
        "tests/test_launch.py::test_a_rank_that_saves_has_longer_than_torchruns_thirty_seconds"),
    Bug("torchrun's own signal is a wish to stop", "engine/launch.py",
        "if found.failures and in_time(found.failures)[0][1] in (PREEMPTED, *FATAL):",
        "if any(code in (PREEMPTED, *FATAL) for _, code in in_time(found.failures)):",
        "tests/test_launch.py::test_what_a_restart_would_undo_or_cannot_mend_is_not_started_again"),
    # ---- models out
    Bug("a merged weight rounded twice", "engine/lora.py",
        "merged = self.weight.float() + self.scale * (b @ a)",
        "merged = (self.weight + (self.scale * (b @ a)).to(self.weight.dtype)).float()",
        "tests/test_export.py::test_a_merged_weight_is_rounded_once"),
    Bug("an export nobody reads back", "engine/export.py",
        "if not found.kl <= self.cfg.export.max_kl:",
        "if False:",
        "tests/test_export.py::test_a_tensor_damaged_after_it_was_written_fails_the_export_and_leaves_nothing"),
    Bug("a converted model nobody reads back", "engine/convert.py",
        "            read_model(building,",
        "            (lambda *read: None)(building,",
        "tests/test_convert.py::test_what_is_not_read_back_gets_no_name"),
    Bug("a merged model with the base's vocabulary", "engine/export.py",
        ', "vocab_size": model.config.vocab_size}',
        "}",
        "tests/test_added_tokens.py::test_convert_takes_them_over_with_an_adapter_as_the_run_does"),
    Bug("a merged model with the base's tokenizer", "engine/export.py",
        "return adapter_folder if own else base",
        "return base",
        "tests/test_added_tokens.py::test_convert_takes_them_over_with_an_adapter_as_the_run_does"),
    Bug("a merged model asked in another way", "engine/convert.py",
        "note = adapter and note_of(adapter) or note_of(source)",
        "note = note_of(source)",
        "tests/test_convert.py::test_how_to_ask_is_said_by_the_adapter_else_the_base"),
    Bug("a second model on the GPU for the export", "engine/export.py",
        ".cpu().to(dtype)",
        ".to(dtype)",
        "tests/test_export.py::test_merging_brings_one_matrix_at_a_time_to_the_host"),
    Bug("all rows are answered at once", "engine/sampling.py",
        "return max(1, min(most, ",
        "return max(1, most, min(most, ",
        "tests/test_generate.py::test_as_many_rows_are_answered_at_once_as_their_keys_and_values_have_room"),
]


def planted(bug: Bug, text: str) -> str:
    """The file's text with the bug in it; ValueError where the piece does not stand there once."""
    if text.count(bug.old) != 1:
        raise ValueError(f"{bug.name}: {bug.file} holds {bug.old!r} {text.count(bug.old)} times, expected once; write the bug for the code as it is now")
    return text.replace(bug.old, bug.new)


def main(words: list[str]) -> int:
    chosen = [bug for bug in BUGS if not words or any(word in bug.name for word in words)]
    tests = sorted({bug.tests for bug in chosen})
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".pytest_cache", "*.egg-info"))
        print(f"{len(tests)} tests without a bug ...", flush=True)
        code, words_of_pytest = pytest(copy, tests)
        if code:
            print(words_of_pytest)
            return 1
        survivors = 0
        for number, bug in enumerate(chosen, 1):
            path, began = copy / bug.file, time.monotonic()
            text = path.read_text(encoding="utf-8")
            path.write_text(planted(bug, text), encoding="utf-8")
            code, words_of_pytest = pytest(copy, [bug.tests])
            path.write_text(text, encoding="utf-8")
            red = code == 1 and re.search(r"\b\d+ failed", words_of_pytest) is not None  # a fault of the bug's own would be an error in collection
            survivors += not red
            verdict = "red" if red else f"STILL GREEN (pytest: {code})"
            print(f"{number:3}/{len(chosen)}  {verdict:<24} {time.monotonic() - began:5.0f} s  {bug.name}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} bugs turned a test red")
    return 1 if survivors else 0


def pytest(copy: Path, tests: list[str]) -> tuple[int, str]:
    """Its exit code (1: tests failed) and output."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", *tests], cwd=copy, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
