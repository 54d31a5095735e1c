//! The daemon: every operation on VMs, one story per file. `wiring.rs` holds [`Daemon`] and
//! connects the parts. Imports inside this directory run one way: from `wiring.rs` down to
//! `core.rs`.
//!
//! # The life of a VM
//!
//! ```text
//! created ── start ──> starting ──> running ── stop ──> stopping ──> stopped
//!                         │            │                   │            │
//!                         └─ failed <──┴── the VMM died    │          start, restore, delete
//!                              │                           │
//!                              └── start, delete ──> deleting ──> (row removed)
//! ```
//!
//! A VM is a row in the store. Its state says what may begin next ([`transitions`], a pure table),
//! and the row exists for as long as the VM does. Pause, unresponsive and pending changes are
//! members of the row, not states.
//!
//! Every operation that changes the state (start, stop, restart, kill, delete, restore) runs in
//! three steps:
//!
//! 1. **Claim** (`lifecycle.rs`). Under the VM's lock, for microseconds: look up the table, write
//!    the new state and the operation in one store transaction, and cancel transfers and sessions
//!    if the guest is about to end. The answer may also be "nothing to do", a refusal with a hint,
//!    or "wait for the operation in progress".
//! 2. **Work** (`boot.rs`, `down.rs`). In the operation's own thread, without a lock. The thread
//!    first waits until the claim is durable. A boot runs its steps one by one. Whatever a step
//!    takes from the host is already in the ledger (`resources/`).
//! 3. **Commit** (`commit.rs`). Under the lock again: the VM is `running`, `stopped`, `failed` or
//!    gone, or the next step begins. If the store refuses the write, the commit is retried until it
//!    succeeds or the daemon ends.
//!
//! A claim that is dropped without a commit, because its thread panicked, ends the operation as
//! `internal` and the VM as `failed`.
//!
//! ## The queued operation
//!
//! A stop must not wait for a boot, and a delete must not wait for a stop's grace period. So each
//! VM has one slot for a queued operation, its *successor*. A stop that arrives during a boot takes
//! the slot and cancels the boot's token, which ends every wait of the boot. The boot undoes what
//! it did, and its commit starts the stop in the same critical section, so no other caller gets in
//! between. A delete replaces a stop in the slot, and a forced stop shortens the grace period of a
//! stop in progress.
//!
//! ## Everything else that uses a guest
//!
//! Exec, copies, snapshots and connections are *uses*. They do not change the VM's state. They
//! check that the VM is `running` and join its cancel set in one section (`runtime.rs`), so a stop
//! either finds them in the set and cancels them, or they are refused. They never hold the VM's
//! lock while they talk to a guest.
//!
//! Pause, rates and the balloon are members of the row (`pause.rs`, `adjust.rs`). After a change of
//! the row, the driver is called until the guest matches the row. If two callers change a VM at
//! once, the later change wins. Adoption after a restart calls the driver again.
//!
//! ## When something dies
//!
//! - **The VMM.** A watcher reports its exit (`watch.rs`). `vmm::end` finds the cause: an orderly
//!   shutdown is `stopped`, anything else is `failed` with the reason. Sessions and transfers end
//!   with that reason. A VMM that does not respond for 12 s is `unresponsive`: nothing new begins
//!   in its guest, and a stop skips the grace period.
//! - **The daemon.** VMs keep running. The next daemon reads the store and runs `reconcile.rs`: it
//!   adopts live VMMs (identified by pid, start time, boot id, executable and tag), undoes boots
//!   that were in progress, and finishes stops and deletes. It scans the host's processes once for
//!   all VMs, handles running VMs first, and skips VMs at rest with nothing in the ledger. A call
//!   for a VM that is not reconciled yet reconciles it first, except that a stop or delete does not
//!   wait for that (`unreconciled.rs`).
//! - **The daemon again, while it recovers.** Recovery has a crash budget (`recovery.rs`): an
//!   operation that was being resumed when the daemon died is not resumed in the same way. The next
//!   daemon kills the VMM without asking the guest, the one after it marks the VM `failed`, and the
//!   one after that leaves the VM to its owner. The same holds for adopting a VM.
//!
//! Everything that a daemon can leave behind is in the ledger. `sweep` releases it at start and
//! every minute, and `fcctl doctor --leaks` lists what carries fcd's names on the host but has no
//! row.
//!
//! # Locks
//!
//! `vm_locks[id]` protects transitions and is held for microseconds. `workspace_locks[id]` is held
//! by the operation's thread for a whole import or export. A stop never waits for a thread that
//! holds it. `create_vm` and `image_ops` are single locks for names and images. `src/locks/rank.rs`
//! defines the order. Only the workspace lock may be held during I/O; under all others there is
//! only memory access.
//!
//! # Sharing between users
//!
//! Every user who may connect shares one daemon. Everything that a user can accumulate has a limit
//! per uid in `[limits]`: connections, operations, VMs, memory, transfers, image builds, images,
//! history, idempotency keys. Root has its own share. A call over a limit fails with `busy` or
//! `exhausted`.
//!
//! - Transfers: a free worker takes the next job of the uid with the fewest running jobs, and one
//!   uid never gets all workers. A stream below the minimum rate ends (`rate_floor.rs`).
//! - At most `limits.builds_max` builds run at once; further builds wait (`images.rs`). An image
//!   belongs to the user who built it.
//! - Finished operations are kept per uid. The operation that a live idempotency key stands for is
//!   kept as long as the key. A refused call leaves no record.
//! - `doctor` runs once for all callers that wait for it (`single_flight.rs`).

mod abandon;
mod access;
mod adjust;
mod adoption;
mod auto;
mod auto_plan;
mod auto_ports;
mod boot;
mod call;
mod capacity;
mod changes;
mod close;
mod command_defaults;
mod commit;
mod connect;
mod console;
mod controls;
mod core;
mod create;
mod debug;
mod disk_probe;
mod doctor;
mod down;
mod durable;
mod effects;
mod events;
mod feeder;
mod give_up;
pub mod gone;
mod grant;
mod guest_holder;
mod guest_scripts;
mod guests;
pub mod helpers;
#[cfg_attr(
    not(any(test, feature = "fakes")),
    allow(dead_code, reason = "only tests read the history")
)]
pub mod history;
mod hold;
mod host_view;
mod image_commit;
mod image_export;
mod image_promote;
mod image_pull;
mod image_register;
mod image_reserve;
mod images;
mod kernels;
mod keys;
mod leak;
mod lifecycle;
mod listing;
mod locks;
mod names;
mod network;
mod notes;
mod operations;
mod pause;
mod port_adoption;
mod port_changes;
mod port_claims;
mod ports;
mod rate_floor;
mod reconcile;
mod records;
mod recovery;
mod resources;
mod restore;
mod room;
mod rules;
mod runtime;
mod seams;
mod sessions;
mod settings;
mod single_flight;
mod snapshot_registry;
mod snapshot_writer;
mod snapshots;
mod space;
mod spec;
mod stats;
mod temporary;
mod transfer;
mod transitions;
mod uids;
pub mod uninstall;
mod unreconciled;
mod uses;
mod verbs;
mod views;
mod vm_dir;
mod vm_view;
mod vmms;
mod waiting;
mod watch;
mod watchdog;
mod wiring;
mod workspaces;

pub use crate::ops::Change as OpEvent;
pub use access::Caller;
pub use call::CallOutcome;
pub use core::Core;
#[cfg(any(test, feature = "fakes"))]
pub use debug::Leftovers;
pub use doctor::host_checks;
#[cfg(feature = "fakes")]
pub use effects::DieAt;
#[cfg(any(test, feature = "fakes"))]
pub use effects::Plan as EffectPlan;
pub use events::WatchLine;
pub use keys::{HeldKey, Keyed};
#[cfg(any(test, feature = "fakes"))]
pub use locks::VmNames;
pub use notes::Notes;
pub(crate) use resources::state_dir_check;
pub use seams::Seams;
pub use sessions::ExecIo;
#[cfg(any(test, feature = "fakes"))]
pub use transitions::{Decision, decide, markdown_table as transitions_table};
pub use waiting::{Gone, Hangup};
pub use watchdog::Watchdog;
pub use wiring::Daemon;
