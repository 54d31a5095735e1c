//! The daemon: every operation on VMs, one story per file. This module holds [`Daemon`] and wires
//! the mechanisms together.
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
//!    the new state and the operation in one store transaction, cancel transfers and sessions if
//!    the guest is about to end. The answer may also be "nothing to do", a refusal with a hint, or
//!    "wait for the operation in progress".
//! 2. **Work** (`boot.rs`, `down.rs`). In a thread of the operation's own and without a lock. It
//!    first waits until the claim is durable. A boot takes resources from the host one by one; each
//!    is in the ledger before it is taken (`resources/`).
//! 3. **Commit** (`commit.rs`). Under the lock again: the VM is `running`, `stopped`, `failed` or
//!    gone, or the next step begins. If the store refuses the write, the commit is retried until it
//!    succeeds or the daemon ends.
//!
//! A claim that is dropped without a commit, because its thread panicked, ends the operation as
//! `internal` and the VM as `failed`.
//!
//! ## The queued operation
//!
//! A stop must not wait for a boot, and a delete must not wait for a stop's grace period. Each VM
//! therefore has one slot for a queued operation. A stop that arrives during a boot takes the slot
//! and cancels the boot's token; every wait of a boot ends at that token. The boot undoes what it
//! did, and its commit starts the stop in the same critical section, so no other caller gets in
//! between. A delete replaces a stop in the slot, and a forced stop shortens the grace of the one
//! in progress.
//!
//! ## Everything else that uses a guest
//!
//! Exec, copies, snapshots and connections are *uses*. They take no state. They check that the VM
//! is `running` and join its cancel set in one section (`runtime.rs`), so a stop either finds them
//! in the set and cancels them, or they are refused. They never hold the VM's lock while they talk
//! to a guest.
//!
//! Pause, rates and the balloon are wishes in the row (`pause.rs`, `adjust.rs`). The driver is told
//! afterwards, until it has done what the row says. Of two callers the later one wins, and adoption
//! after a restart tells the driver again.
//!
//! ## When something dies
//!
//! - **The VMM.** A watcher reports its exit (`watch.rs`). `vmm::end` finds out why: a shutdown in
//!   order is `stopped`, anything else is `failed` with the reason. Sessions and transfers end with
//!   that reason. A VMM that does not answer for 12 s is `unresponsive`: nothing new begins in its
//!   guest, and a stop skips the grace.
//! - **The daemon.** VMs keep running. The next daemon reads the store and runs `reconcile.rs`: it
//!   adopts live VMMs (identified by pid, start time, boot id, executable and tag), undoes boots
//!   that were in progress, and finishes stops and deletes. It looks at the host's processes once
//!   for all VMs, takes running VMs first, and skips VMs at rest with nothing in the ledger. A call
//!   for a VM that has not been looked at does that itself; a stop or delete does not wait even for
//!   that (`looks.rs`).
//! - **The daemon again, while it recovers.** Recovery has a crash budget (`recovery.rs`): an
//!   operation that was being resumed when the daemon died is not resumed in the same way. The next
//!   daemon kills the VMM without asking the guest, the one after it marks the VM `failed`, and the
//!   one after that leaves the VM to its owner. The same holds for adopting a VM.
//!
//! What a daemon leaves behind, whenever it dies, is in the ledger. `sweep` gives it back at start
//! and every minute, and `fcctl doctor --leaks` lists what is on the host under fcd's names without
//! a row.
//!
//! # Locks
//!
//! `vm_locks[id]` protects transitions and is held for microseconds. `workspace_locks[id]` is held
//! for a whole import or export, by the operation's thread, and by nothing that a stop waits for.
//! `create_vm` and `image_ops` are single locks for names and images. `src/locks/rank.rs` has the
//! order. Under all of them but the workspace lock there is only memory access.
//!
//! # Sharing between users
//!
//! Every user who may connect shares one daemon. Whatever one user can pile up has a limit per uid
//! in `[limits]`: connections, operations, VMs, memory, transfers, image builds, images, history,
//! idempotency keys. Root has its own share. A call over a limit fails with `busy` or `exhausted`.
//!
//! - Transfers: a free worker takes the next job of the uid with the fewest running jobs, and one
//!   uid never gets all workers. A stream below the minimum rate ends (`rate_floor.rs`).
//! - Builds run one at a time, others wait in line (`images.rs`). An image belongs to whoever built
//!   it.
//! - Finished operations are kept per uid. The operation that a live idempotency key stands for is
//!   kept as long as the key. A refused call leaves no record.
//! - `doctor` runs once for all callers that wait for it (`single_flight.rs`).

mod access;
mod adjust;
mod adoption;
mod auto;
mod boot;
mod captures;
mod close;
mod commit;
mod connect;
mod console;
mod create;
mod debug;
mod doctor;
mod down;
mod effects;
mod events;
mod feeder;
pub mod gone;
pub mod helpers;
pub mod history;
mod hold;
mod images;
mod kernels;
mod keys;
mod lifecycle;
mod listing;
mod locks;
mod looks;
mod names;
mod network;
mod notes;
mod operations;
mod pause;
mod ports;
mod rate_floor;
mod reconcile;
mod recovery;
mod resources;
mod restore;
mod room;
mod runtime;
mod sessions;
mod single_flight;
mod snapshots;
mod stats;
mod transfer;
mod transitions;
mod uids;
mod uses;
mod verbs;
mod waiting;
mod watch;
mod workspaces;

pub use crate::ops::Change as OpEvent;
pub use access::Caller;
pub use debug::Leftovers;
pub use doctor::host_checks;
#[cfg(feature = "fakes")]
pub use effects::DieAt;
#[cfg(any(test, feature = "fakes"))]
pub use effects::Plan as EffectPlan;
pub use events::WatchLine;
pub use keys::{HeldKey, Keyed};
pub use notes::Notes;
pub(crate) use resources::state_dir_check;
pub use sessions::ExecIo;
pub use transitions::{Decision, decide, markdown_table as transitions_table};
pub use waiting::{Gone, Hangup};

use crate::config::{Config, VmmDriver};
use crate::error::{Error, Kind, Result};
use crate::guest::ControlSender;
use crate::guest::Transport;
use crate::host::Commands;
use crate::ids::{OpId, VmId};
use crate::image::Images;
use crate::image::kernels::Kernels;
use crate::locks::{Cancel, Mutex, Rank};
use crate::ops::Ops;
use crate::pool::{self, Admission, Pool};
use crate::store::{Store, Ticket, Tx};
use crate::uids::Retention;
use crate::vmm::Driver;
use crate::vmm::console::Consoles;
use crate::vmm::drivers::Drivers;
use crate::vmm::firecracker::Firecracker;
use crate::vmm::qemu::Qemu;
use serde::Serialize;
use serde_json::Value;
use std::collections::HashSet;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const VMS_DIR: &str = "vms";
/// How long a change may take to reach the disk.
const DURABLE_DEADLINE: Duration = Duration::from_secs(60);
/// How long a killed VMM may take to be gone: the kernel frees its memory first.
const KILL_DEADLINE: Duration = Duration::from_secs(60);
/// Of the host's memory, what VMs get when the configuration does not say.
const MEM_SHARE_PERCENT: u64 = 80;

/// The true seams: tests put fakes here.
pub struct Seams {
    pub vmm: Arc<dyn Driver>,
    pub transport: Arc<dyn Transport>,
    pub commands: Arc<dyn Commands>,
    /// None where the daemon is not root: it has nothing that others could leave behind.
    pub installations: Option<Box<dyn gone::Installations>>,
}

impl Seams {
    /// The real ones.
    pub fn real(config: &Config) -> Result<Self> {
        Ok(Self {
            vmm: Arc::new(drivers(config)?),
            transport: Arc::new(crate::guest::SshTransport),
            commands: Arc::new(crate::host::HostCommands),
            installations: None,
        })
    }
}

/// The one that the configuration names, and those that may have VMs of an earlier one.
fn drivers(config: &Config) -> Result<Drivers> {
    let consoles = Arc::new(Consoles::try_new()?);
    let qemu = Arc::new(Qemu::new(config.qemu.clone(), consoles.clone())?);
    let firecracker = Arc::new(Firecracker::new(config.firecracker.clone(), config.qemu.uids(), consoles)?);
    Ok(match config.vmm.driver {
        VmmDriver::Qemu => Drivers::new(qemu, vec![firecracker]),
        VmmDriver::Firecracker => Drivers::new(firecracker, vec![qemu]),
        VmmDriver::Auto => {
            let missing = auto::missing(config, firecracker.as_ref(), nix::unistd::geteuid().is_root());
            let check = auto::check(missing.as_ref());
            log::info!("{}", check.found);
            match missing {
                None => Drivers::new(firecracker, vec![qemu]).with_check(check),
                Some(_) => Drivers::new(qemu, vec![firecracker]).with_check(check),
            }
        }
    })
}

/// What a clone of [`Daemon`] shares.
pub struct Inner {
    pub config: Config,
    pub store: Store,
    pub ops: Ops,
    pub locks: locks::OpLocks,
    pub pool: Pool,
    images: Images,
    kernels: Kernels,
    /// Creations use kernels.
    kernel_uses: uses::Uses<crate::ids::KernelName>,
    sessions: crate::session::Registry<ControlSender>,
    admission: Admission,
    runtimes: runtime::Runtimes,
    vmm: Arc<dyn Driver>,
    transport: Arc<dyn Transport>,
    commands: Arc<dyn Commands>,
    /// The bridge and what is on it; none: user-mode networking.
    net: Option<crate::net::Net>,
    name_server: Mutex<Option<crate::net::dns::Server>>,
    mem_mib_max: u64,
    /// How new root disks are made; or why none can be.
    disk_probe: Result<crate::disk::Probe>,
    builds: Mutex<images::Builds>,
    build_admission: Admission,
    image_uses: uses::Uses<crate::ids::ImageRef>,
    beginning: keys::Beginning,
    host_checks: doctor::HostChecks,
    captures: captures::Captures,
    looks: looks::Looks,
    /// Until the reconciler has looked at every VM.
    earlier_vmms: Mutex<Option<Arc<looks::EarlierVmms>>>,
    settled: reconcile::Settled,
    adoptions: adoption::Adoptions,
    installations: Option<Box<dyn gone::Installations>>,
    feeder: feeder::Feeder,
    /// VMs whose recovery or adoption this daemon has attempted.
    recovering: Mutex<HashSet<VmId>>,
    /// Fires when the daemon closes.
    closing: Cancel,
    pub effects: effects::Effects,
    pub history: history::History,
    threads: close::Threads,
    started: Instant,
}

/// A handle; clones are the same daemon.
#[derive(Clone)]
pub struct Daemon(Arc<Inner>);

impl Deref for Daemon {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.0
    }
}

/// What a lifecycle call answers at once.
#[derive(Debug)]
pub enum Begun {
    /// An operation of this call's own.
    Op(OpId),
    /// The operation under way, which this call waits for but does not own.
    Joined(OpId),
    Done(Value),
}

impl Begun {
    fn done(reply: &impl Serialize) -> Result<Self> {
        to_value(reply).map(Begun::Done)
    }
}

fn to_value(reply: &impl Serialize) -> Result<Value> {
    serde_json::to_value(reply).map_err(|e| Error::internal("write a reply").with_source(e))
}

/// The registry with what the store has kept. Operations whose threads died with the earlier daemon have ended.
fn open_ops(store: &Store, retention: Retention, mut rows: Vec<crate::api::op::Op>) -> Result<Ops> {
    let keep = store.clone();
    let ops = Ops::new(retention, move |ended| {
        let kept = keep.change_essential(|tx| {
            tx.put_op(ended.op);
            Ok(())
        });
        if let Err(e) = kept {
            log::warn!("write down an operation that was dropped: {e}");
        }
    });
    rows.sort_by_key(|op| op.started_at);
    let broken = ops.restore(rows)?;
    let written = store.change_essential(|tx| {
        for ended in broken {
            tx.put_op(ended.op);
        }
        Ok(())
    });
    match written.and_then(|((), ticket)| ticket.wait(Instant::now() + DURABLE_DEADLINE).map(drop)) {
        // On a full disk there must be a daemon that deletes. The next one finds them broken again.
        Err(e) if matches!(e.kind(), Kind::DiskFull | Kind::StoreReadOnly) => log::warn!("write down what was cut off: {e}"),
        other => other?,
    }
    Ok(ops)
}

/// Seconds since the epoch.
fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl Daemon {
    /// Opens the state directory, which the caller has locked. Reconcile follows: [`Daemon::reconcile`].
    pub fn open(config: Config, seams: Seams) -> Result<Self> {
        // VMMs of other uids reach what is theirs below it.
        drop(crate::host::fs::create_dir(&config.state_dir.join(VMS_DIR), 0o711)?);
        drop(crate::host::fs::create_dir(&config.state_dir.join(captures::SNAPSHOTS_DIR), 0o711)?);
        let store = Store::open_keeping(&config.state_dir, config.limits.retention())?;
        store.read(|s| uids::require(&config, s))?;
        let limits = &config.limits;
        let boots = if limits.boots_max == 0 { crate::host::limits::cores() } else { limits.boots_max };
        let mem_mib_max = match limits.mem_mib_max {
            0 => crate::host::limits::mem_total_mib()? * MEM_SHARE_PERCENT / 100,
            set => set,
        };
        let (rows, to_look_at) = store.read(|s| (s.ops().map(|o| (**o).clone()).collect::<Vec<_>>(), reconcile::to_look_at(s)));
        let ops = open_ops(&store, config.limits.retention(), rows)?;
        let closing = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        if let Some(installations) = &seams.installations {
            installations.set_own(store.install_id())?;
            // Before the network: the bridge of one that is gone may have the name that ours is to have.
            gone::sweep(installations.as_ref(), &seams.commands, true);
        }
        let net = network::open(&config, &store, &seams.commands, &closing)?;
        let disk_probe = room::probe(&config, seams.vmm.as_ref(), &config.state_dir);
        let inner = Inner {
            net,
            disk_probe,
            name_server: Mutex::new(Rank::Runtimes, None),
            pool: Pool::new(pool::Bounds {
                workers: limits.pool_workers,
                running_per_uid_max: limits.running_per_uid_max(),
                queue_max: limits.pool_queue,
                queue_per_uid_max: limits.queue_per_uid_max,
            })?,
            images: Images::open(&config.state_dir)?,
            kernels: Kernels::open(&config.state_dir)?,
            kernel_uses: uses::Uses::new(),
            sessions: crate::session::Registry::new(),
            admission: Admission::new("boots", boots),
            locks: locks::OpLocks::new(),
            runtimes: runtime::Runtimes::new(),
            vmm: seams.vmm,
            transport: seams.transport,
            commands: seams.commands,
            builds: Mutex::new(Rank::Runtimes, images::Builds::default()),
            build_admission: Admission::new("builds", limits.builds_max),
            image_uses: uses::Uses::new(),
            beginning: keys::Beginning::new(),
            host_checks: doctor::host_checks_shared(),
            captures: captures::Captures::new(),
            looks: looks::Looks::new(to_look_at.clone()),
            earlier_vmms: Mutex::new(Rank::Runtimes, Some(Arc::new(looks::EarlierVmms::new(to_look_at)))),
            settled: reconcile::Settled::new(),
            adoptions: adoption::open(&store),
            installations: seams.installations,
            feeder: feeder::Feeder::new(),
            recovering: Mutex::new(Rank::Runtimes, HashSet::new()),
            closing,
            effects: effects::Effects::default(),
            history: history::History::default(),
            threads: close::Threads::new(),
            started: Instant::now(),
            mem_mib_max,
            ops,
            store,
            config,
        };
        let daemon = Self(Arc::new(inner));
        daemon.serve_names()?;
        Ok(daemon)
    }

    pub fn is_closing(&self) -> bool {
        self.closing.is_cancelled()
    }

    /// Starts a thread of an operation. It is counted, so that close can wait for it.
    fn spawn(&self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let count = self.threads.enter();
        crate::host::thread::spawn(name, move || {
            let _count = count;
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_err() {
                log::error!("an operation's thread panicked");
            }
            crate::locks::check::assert_none_held("the end of an operation's thread");
        })
        .map(drop)
    }

    /// Threads of operations now running.
    pub fn threads(&self) -> usize {
        self.threads.count()
    }

    /// One section of the store. `essential` changes (kill, delete, commits) also pass when the disk is full.
    fn change<T>(&self, essential: bool, change: impl FnOnce(&mut Tx) -> Result<T>) -> Result<(T, Ticket)> {
        if essential { self.store.change_essential(change) } else { self.store.change(change) }
    }

    /// Changes a VM's row under its lock. No lock may be held.
    fn change_row(&self, vm: &VmId, essential: bool, change: impl FnOnce(&mut crate::store::VmRow)) -> Result<Ticket> {
        let guard = self.locks.vm.lock(vm);
        self.change(essential, |tx| tx.update_vm(&guard, change)).map(|((), ticket)| ticket)
    }

    fn wait_durable(&self, ticket: Ticket) -> Result<()> {
        ticket.wait(Instant::now() + DURABLE_DEADLINE).map(drop)
    }

    /// Until the disk has taken the change or refused it, however long it takes: what may still become either is no
    /// failure. Ends as a timeout when the daemon closes meanwhile.
    fn wait_settled(&self, ticket: &Ticket) -> Result<()> {
        loop {
            match ticket.wait(Instant::now() + DURABLE_DEADLINE) {
                Err(e) if e.kind() == crate::error::Kind::Timeout && !self.closing.is_cancelled() => {
                    log::warn!("a claim has waited for the disk for {} s", DURABLE_DEADLINE.as_secs());
                }
                other => return other.map(drop),
            }
        }
    }

    /// Waits so long, or until the daemon closes: then true.
    fn pause(&self, period: Duration) -> bool {
        waiting::poll_until(&[self.closing.fd()], Instant::now() + period);
        self.closing.is_cancelled()
    }

    fn kill_vmm(&self, identity: &crate::vmm::Identity) -> Result<()> {
        self.vmm.kill(identity, Instant::now() + KILL_DEADLINE)
    }

    fn vm_dir(&self, vm: &VmId) -> PathBuf {
        self.config.state_dir.join(VMS_DIR).join(vm.as_str())
    }

    /// In the VMM's arguments, so that the process can be found again.
    fn tag(&self, row: &crate::store::VmRow) -> String {
        format!("{}{}-{}", self.tag_prefix(), row.id, row.generation)
    }

    /// With which the names of all that is ours on the host begin.
    fn tag_prefix(&self) -> String {
        format!("fc-{}-", self.store.install_id())
    }

    /// Finds out ahead of the first boot what this host's virtualisation can do. Takes seconds at most.
    pub fn warm_up(&self) {
        if let Ok(image) = self.images.get(&self.config.vm.image) {
            self.vmm.warm_up(&image.kernel, &self.closing);
        }
    }

    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }
}
