//! [`Daemon`]: the parts, and how they are connected.

use super::adoption::{self, Adopter};
use super::auto_ports::AutoForwarder;
use super::capacity::Capacity;
use super::close::Threads;
use super::controls::Controls;
use super::core::{Core, DURABLE_DEADLINE, Shared, VMS_DIR};
use super::create::Creator;
#[cfg(any(test, feature = "fakes"))]
use super::debug::Leftovers;
use super::disk_probe;
use super::doctor::{self, Doctor};
use super::effects::Effects;
use super::events::Watchers;
use super::feeder::Feeder;
use super::gone::{self, Installations};
use super::guest_holder::GuestHolder;
use super::guests::Guests;
use super::history::History;
use super::images::{Builds, ImageService, Pulls};
use super::kernels::KernelService;
use super::keys::{Beginning, Keys};
use super::lifecycle::Lifecycle;
use super::locks::OpLocks;
use super::network::{self, Networks};
use super::port_claims::PortClaims;
use super::reconcile::{self, FirstPass, Reconciler};
use super::records::Attempts;
use super::recovery::Recovery;
use super::resources::Resources;
use super::room::SpaceMonitor;
use super::runtime::Runtimes;
use super::seams::Seams;
use super::sessions::Sessions;
use super::snapshot_registry::{SNAPSHOTS_DIR, SnapshotRegistry};
use super::snapshot_writer::SnapshotWriter;
use super::snapshots::Snapshots;
use super::spec::Specs;
use super::uids;
use super::uninstall::Uninstaller;
use super::unreconciled::{EarlierVmms, Unreconciled, VmReconciler};
use super::uses::Uses;
use super::views::Views;
use super::vmms::Vmms;
use super::workspaces::Transfers;
use crate::config::{Config, Limits, VmDefaults};
use crate::error::{Error, Kind, Result};
use crate::guest::Transport;
use crate::host::Commands;
use crate::host::Credentials;
use crate::ids::VmId;
use crate::image::kernels::Kernels;
use crate::image::pull::Layers;
use crate::image::{Boots, GuestRuntimes, Images};
use crate::locks::{Cancel, CancelCause, Mutex, Rank, check};
use crate::ops::Ops;
use crate::pool::{self, Admission, Pool};
use crate::sched::{HashMap, HashSet, Instant};
use crate::session::Registry;
use crate::store::Store;
use crate::uids::Retention;
use crate::vmm::Driver;
use std::ops::Deref;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// The default share of the host's memory for VMs.
const MEM_SHARE_PERCENT: u64 = 80;

/// The parts of a daemon. Each holds the parts that it uses.
pub struct Parts {
    pub core: Core,
    pub config: Config,
    pub views: Views,
    pub images: ImageService,
    pub kernels: KernelService,
    pub controls: Controls,
    pub auto_forwarder: AutoForwarder,
    pub sessions: Sessions,
    pub creator: Creator,
    pub lifecycle: Lifecycle,
    pub snapshots: Snapshots,
    pub transfers: Transfers,
    pub reconciler: Arc<Reconciler>,
    pub space_monitor: SpaceMonitor,
    pub doctor: Doctor,
    pub uninstaller: Uninstaller,
    pub watchers: Watchers,
    pub keys: Keys,
    networks: Networks,
    recovery: Recovery,
    started: Instant,
}

/// A handle to a daemon. Clones refer to the same daemon.
#[derive(Clone)]
pub struct Daemon(Arc<Parts>);

impl Deref for Daemon {
    type Target = Parts;
    fn deref(&self) -> &Parts {
        &self.0
    }
}

/// Opens the operation registry with the operations that the store has kept. Operations that were
/// running when an earlier daemon died are marked as failed.
fn open_ops(store: &Store, retention: Retention, mut rows: Vec<crate::api::op::Op>) -> Result<Ops> {
    let keep = store.clone();
    let ops = Ops::new(retention, move |ended| {
        let kept = keep.change_essential(|tx| {
            tx.put_op(ended.op);
            Ok(())
        });
        if let Err(e) = kept {
            log::warn!("record an operation that was dropped: {e}");
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
    match written.and_then(|((), ticket)| ticket.wait(Instant::now() + DURABLE_DEADLINE).map(drop))
    {
        // A daemon must start even if the disk is full, so that VMs can be deleted. The next daemon
        // tries again.
        Err(e) if matches!(e.kind(), Kind::DiskFull | Kind::StoreReadOnly) => {
            log::warn!("record interrupted operations: {e}")
        }
        other => other?,
    }
    Ok(ops)
}

fn open_pool(limits: &Limits) -> Result<Pool> {
    Pool::new(pool::Bounds {
        workers: limits.pool_workers,
        running_per_uid_max: limits.running_per_uid_max(),
        queue_max: limits.pool_queue,
        queue_per_uid_max: limits.queue_per_uid_max,
    })
}

fn open_core(config: &Config) -> Result<Core> {
    // VMMs, which have other uids, must reach their files below these directories.
    for name in [VMS_DIR, SNAPSHOTS_DIR] {
        drop(crate::host::fs::create_dir(
            &config.state_dir.join(name),
            0o711,
        )?);
    }
    let store = Store::open_keeping(&config.state_dir, config.limits.retention())?;
    store.read(|s| uids::require(&config.qemu, s))?;
    let rows = store.read(|s| s.ops().map(|o| (**o).clone()).collect::<Vec<_>>());
    let ops = open_ops(&store, config.limits.retention(), rows)?;
    Ok(Core::new(Shared {
        ops,
        store,
        locks: OpLocks::new(),
        limits: config.limits.clone(),
        state_dir: config.state_dir.clone(),
        closing: token()?,
        uninstalling: token()?,
        effects: Effects::default(),
        history: History::default(),
        beginning: Uses::new(),
        threads: Threads::new(),
    }))
}

fn token() -> Result<Cancel> {
    Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))
}

impl Daemon {
    /// Opens the state directory, which the caller has locked. Call [`Reconciler::reconcile`] next.
    pub fn open(config: Config, seams: Seams) -> Result<Self> {
        let core = open_core(&config)?;
        let left = core.store.read(reconcile::unreconciled_vms);
        if let Some(installations) = &seams.installations {
            installations.set_own(core.store.install_id())?;
            // Sweep before the network is set up, because a bridge of a removed installation may
            // have the name of this daemon's bridge.
            gone::sweep(installations.as_ref(), &seams.commands, true);
        }
        let daemon = Self(Arc::new(Parts::assemble(core, config, seams, left)?));
        daemon.networks.serve_names()?;
        Ok(daemon)
    }

    /// Probes the host's virtualisation before the first boot, if there is a default image to probe
    /// it with. May take several seconds.
    pub fn warm_up(&self) {
        let Ok(image) = self.lifecycle.images.get(&self.config.vm.image) else {
            return;
        };
        let runtimes = &self.lifecycle.specs.guest_runtimes;
        let kernel = match image.boots {
            Boots::Own { kernel, .. } => Some(kernel),
            Boots::Runtime => runtimes.newest().ok().map(|r| runtimes.files(&r.id).kernel),
        };
        if let Some(kernel) = kernel {
            self.lifecycle.vmm.warm_up(&kernel, &self.core.closing);
        }
    }

    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Shuts the daemon down. The caller must make sure that no new call can arrive. Transfers may
    /// finish until `transfers_until`, everything else until `deadline`. VMs keep running.
    pub fn close(&self, transfers_until: Instant, deadline: Instant) {
        self.core.closing.cancel(CancelCause::DaemonStops);
        self.lifecycle
            .runtimes
            .cancel_watches(&CancelCause::DaemonStops);
        if !self.core.threads.wait_idle(transfers_until) {
            log::info!("cancelling everything in progress");
        }
        // Sessions run on the threads of their callers.
        self.lifecycle
            .runtimes
            .cancel_everything(&CancelCause::DaemonStops);
        self.core.threads.wait_idle(deadline);
        self.transfers.pool.close(deadline);
        self.networks.close_network();
        self.recovery.end_all_attempts();
        self.core.store.close();
        let violations = check::violations();
        if violations > 0 {
            log::error!("{violations} violations of the lock order");
        }
    }

    /// Counts what is in progress. For tests: in an idle daemon, every count is 0.
    #[cfg(any(test, feature = "fakes"))]
    pub fn leftovers(&self) -> Leftovers {
        let pool = self.transfers.pool.counts();
        // This is a separate statement, so that its lock is released before the next lock is taken.
        let images_being_built = self.images.builds.lock().len();
        Leftovers {
            locks: self.core.locks.entries(),
            runtimes: self.lifecycle.runtimes.len(),
            threads: self.core.thread_count(),
            sessions: self.sessions.registry.len(),
            jobs: pool.running + pool.places,
            operations: self.core.ops.running(),
            images_being_built,
            keys_beginning: self.keys.beginning.len(),
        }
    }
}

/// The values from which more than one part is built.
struct Base {
    core: Core,
    views: Views,
    runtimes: Runtimes,
    networks: Networks,
    specs: Specs,
    vmms: Vmms,
    guests: Guests,
    unreconciled: Arc<Unreconciled>,
    capacity: Capacity,
    adopter: Adopter,
    recovery: Recovery,
    image_service: ImageService,
    kernel_service: KernelService,
    images: Images,
    snapshot_registry: SnapshotRegistry,
    vmm: Arc<dyn Driver>,
    transport: Arc<dyn Transport>,
    commands: Arc<dyn Commands>,
}

impl Base {
    fn new(core: Core, config: &Config, seams: &Seams, left: HashMap<VmId, u64>) -> Result<Self> {
        let (vmm, commands, limits) = (seams.vmm.clone(), seams.commands.clone(), &config.limits);
        let runtimes = Runtimes::new();
        let (images, kernels) = (
            Images::open(&config.state_dir)?,
            Kernels::open(&config.state_dir)?,
        );
        let guest_runtimes = GuestRuntimes::open(&config.state_dir)?;
        let networks = open_networks(&core, config, seams)?;
        let disk_probe = Arc::new(disk_probe::probe(
            &config.disk,
            vmm.as_ref(),
            &config.state_dir,
        ));
        let uid_base = config.qemu.uid_base;
        let specs = Specs {
            core: core.clone(),
            networks: networks.clone(),
            kernels: kernels.clone(),
            guest_runtimes: guest_runtimes.clone(),
            runtime_uses: Uses::new(),
            disk_probe,
            uid_base,
        };
        let earlier = Some(Arc::new(EarlierVmms::new(left.clone())));
        let earlier_vmms = Arc::new(Mutex::new(Rank::Runtimes, earlier));
        let attempts = Attempts::new();
        let adoptions = Arc::new(adoption::open(&core.store));
        let adopter = Adopter {
            core: core.clone(),
            adoptions,
            attempts: attempts.clone(),
        };
        let kernel_service = KernelService {
            core: core.clone(),
            commands: commands.clone(),
            images: images.clone(),
            guest_runtimes: guest_runtimes.clone(),
            kernels,
            uses: Uses::new(),
        };
        let image_service = ImageService {
            core: core.clone(),
            commands: commands.clone(),
            images: images.clone(),
            guest_runtimes,
            uses: Uses::new(),
            builds: Arc::new(Mutex::new(Rank::Runtimes, Builds::default())),
            build_admission: Admission::new("builds", limits.builds_max),
            pulls: pulls(config)?,
            specs: specs.clone(),
            kernel_service: kernel_service.clone(),
            default_image: config.vm.image.clone(),
        };
        Ok(Self {
            views: Views {
                core: core.clone(),
                runtimes: runtimes.clone(),
            },
            vmms: Vmms {
                core: core.clone(),
                specs: specs.clone(),
                vmm: vmm.clone(),
                earlier_vmms,
            },
            guests: Guests {
                core: core.clone(),
                specs: specs.clone(),
            },
            unreconciled: Arc::new(Unreconciled::new(left)),
            capacity: Capacity {
                core: core.clone(),
                mem_mib_max: mem_mib_max(limits)?,
            },
            recovery: Recovery {
                core: core.clone(),
                adopter: adopter.clone(),
                attempts,
            },
            snapshot_registry: SnapshotRegistry::new(&config.state_dir),
            transport: seams.transport.clone(),
            core,
            runtimes,
            networks,
            specs,
            adopter,
            image_service,
            kernel_service,
            images,
            vmm,
            commands,
        })
    }

    fn controls(&self) -> Controls {
        Controls {
            core: self.core.clone(),
            views: self.views.clone(),
            networks: self.networks.clone(),
            specs: self.specs.clone(),
            capacity: self.capacity.clone(),
            unreconciled: self.unreconciled.clone(),
            runtimes: self.runtimes.clone(),
            images: self.images.clone(),
            vmms: self.vmms.clone(),
            port_claims: Arc::new(PortClaims::new()),
        }
    }

    fn auto_forwarder(&self, controls: &Controls) -> AutoForwarder {
        AutoForwarder {
            core: self.core.clone(),
            controls: controls.clone(),
            guests: self.guests.clone(),
            runtimes: self.runtimes.clone(),
            transport: self.transport.clone(),
            followed: Arc::new(Mutex::new(Rank::Runtimes, HashSet::default())),
        }
    }

    fn sessions(&self) -> Sessions {
        Sessions {
            core: self.core.clone(),
            views: self.views.clone(),
            guests: self.guests.clone(),
            unreconciled: self.unreconciled.clone(),
            runtimes: self.runtimes.clone(),
            registry: Arc::new(Registry::new()),
            transport: self.transport.clone(),
            vmms: self.vmms.clone(),
        }
    }

    fn resources(
        &self,
        config: &Config,
        installations: Option<Arc<dyn Installations>>,
    ) -> Resources {
        Resources {
            core: self.core.clone(),
            networks: self.networks.clone(),
            specs: self.specs.clone(),
            vmms: self.vmms.clone(),
            snapshot_registry: self.snapshot_registry.clone(),
            commands: self.commands.clone(),
            vmm: self.vmm.clone(),
            installations,
            disk: config.disk.clone(),
            synced: config.sync.clone().into(),
        }
    }

    fn lifecycle(&self, controls: &Controls, resources: &Resources) -> Lifecycle {
        let boots_max = match self.core.limits.boots_max {
            0 => crate::host::limits::cores(),
            set => set,
        };
        Lifecycle {
            core: self.core.clone(),
            views: self.views.clone(),
            runtimes: self.runtimes.clone(),
            unreconciled: self.unreconciled.clone(),
            recovery: self.recovery.clone(),
            capacity: self.capacity.clone(),
            kernel_service: self.kernel_service.clone(),
            specs: self.specs.clone(),
            vmms: self.vmms.clone(),
            guests: self.guests.clone(),
            controls: controls.clone(),
            auto_forwarder: self.auto_forwarder(controls),
            resources: resources.clone(),
            images: self.images.clone(),
            boots: Admission::new("boots", boots_max),
            transport: self.transport.clone(),
            vmm: self.vmm.clone(),
        }
    }

    fn creator(&self, controls: &Controls, defaults: VmDefaults) -> Creator {
        Creator {
            core: self.core.clone(),
            networks: self.networks.clone(),
            controls: controls.clone(),
            capacity: self.capacity.clone(),
            image_service: self.image_service.clone(),
            kernel_service: self.kernel_service.clone(),
            defaults,
        }
    }

    fn snapshots(
        &self,
        creator: &Creator,
        sessions: &Sessions,
        lifecycle: &Lifecycle,
    ) -> Snapshots {
        let holder = GuestHolder {
            core: self.core.clone(),
            controls: lifecycle.controls.clone(),
            vmms: self.vmms.clone(),
            runtimes: self.runtimes.clone(),
        };
        let writer = SnapshotWriter {
            core: self.core.clone(),
            specs: self.specs.clone(),
            guests: self.guests.clone(),
            resources: lifecycle.resources.clone(),
            snapshot_registry: self.snapshot_registry.clone(),
            holder,
            images: self.images.clone(),
            commands: self.commands.clone(),
            transport: self.transport.clone(),
        };
        Snapshots {
            core: self.core.clone(),
            views: self.views.clone(),
            networks: self.networks.clone(),
            sessions: sessions.clone(),
            creator: creator.clone(),
            lifecycle: lifecycle.clone(),
            snapshot_registry: self.snapshot_registry.clone(),
            writer,
            vmm: self.vmm.clone(),
        }
    }

    fn transfers(&self, sessions: &Sessions) -> Result<Transfers> {
        Ok(Transfers {
            core: self.core.clone(),
            views: self.views.clone(),
            guests: self.guests.clone(),
            sessions: sessions.clone(),
            pool: Arc::new(open_pool(&self.core.limits)?),
            transport: self.transport.clone(),
        })
    }

    fn reconciler(&self, lifecycle: &Lifecycle) -> Arc<Reconciler> {
        let reconciler = Arc::new(Reconciler {
            core: self.core.clone(),
            recovery: self.recovery.clone(),
            adopter: self.adopter.clone(),
            unreconciled: self.unreconciled.clone(),
            networks: self.networks.clone(),
            specs: self.specs.clone(),
            vmms: self.vmms.clone(),
            controls: lifecycle.controls.clone(),
            resources: lifecycle.resources.clone(),
            lifecycle: lifecycle.clone(),
            images: self.images.clone(),
            vmm: self.vmm.clone(),
            first_pass: FirstPass::new(),
        });
        let weak: Weak<dyn VmReconciler> = Arc::downgrade(&reconciler) as Weak<dyn VmReconciler>;
        self.unreconciled.set_reconciler(weak);
        reconciler
    }

    fn space_monitor(&self, controls: &Controls) -> SpaceMonitor {
        SpaceMonitor {
            core: self.core.clone(),
            specs: self.specs.clone(),
            controls: controls.clone(),
            runtimes: self.runtimes.clone(),
            commands: self.commands.clone(),
            vmms: self.vmms.clone(),
        }
    }

    fn doctor(
        &self,
        config: Config,
        resources: &Resources,
        reconciler: &Arc<Reconciler>,
    ) -> Doctor {
        Doctor {
            core: self.core.clone(),
            config,
            networks: self.networks.clone(),
            recovery: self.recovery.clone(),
            resources: resources.clone(),
            reconciler: reconciler.clone(),
            images: self.images.clone(),
            commands: self.commands.clone(),
            vmm: self.vmm.clone(),
            host_checks: doctor::host_checks_shared(),
        }
    }
}

fn open_networks(core: &Core, config: &Config, seams: &Seams) -> Result<Networks> {
    Ok(Networks {
        core: core.clone(),
        vmm: seams.vmm.clone(),
        net: network::open(&config.network, &core.store, &seams.commands, &core.closing)?
            .map(Arc::new),
        name_server: Arc::new(Mutex::new(Rank::Runtimes, None)),
        config: config.network.clone(),
        user_mode_ipv6: network::user_mode_ipv6(config),
        vm_uids: uids::for_vms(&config.qemu),
        helper_uid: config.qemu.helper_uid(),
    })
}

impl Parts {
    /// Builds the parts bottom-up, each from the parts that it uses.
    fn assemble(
        core: Core,
        config: Config,
        seams: Seams,
        left: HashMap<VmId, u64>,
    ) -> Result<Self> {
        let base = Base::new(core.clone(), &config, &seams, left)?;
        let (controls, sessions) = (base.controls(), base.sessions());
        let resources = base.resources(&config, seams.installations);
        let lifecycle = base.lifecycle(&controls, &resources);
        let creator = base.creator(&controls, config.vm.clone());
        let reconciler = base.reconciler(&lifecycle);
        Ok(Self {
            snapshots: base.snapshots(&creator, &sessions, &lifecycle),
            transfers: base.transfers(&sessions)?,
            space_monitor: base.space_monitor(&controls),
            doctor: base.doctor(config.clone(), &resources, &reconciler),
            uninstaller: Uninstaller {
                core: core.clone(),
                socket: config.socket.clone(),
                has_bridge: config.network.is_bridge(),
                commands: base.commands.clone(),
            },
            watchers: Watchers {
                core: core.clone(),
                feeder: Feeder::new(),
            },
            keys: Keys {
                core: core.clone(),
                beginning: Arc::new(Beginning::new()),
            },
            views: base.views,
            images: base.image_service,
            kernels: base.kernel_service,
            networks: base.networks,
            recovery: base.recovery,
            started: Instant::now(),
            auto_forwarder: lifecycle.auto_forwarder.clone(),
            controls,
            sessions,
            creator,
            lifecycle,
            reconciler,
            core,
            config,
        })
    }
}

/// Returns how much memory all VMs together may have.
fn mem_mib_max(limits: &Limits) -> Result<u64> {
    match limits.mem_mib_max {
        0 => Ok(crate::host::limits::mem_total_mib()? * MEM_SHARE_PERCENT / 100),
        set => Ok(set),
    }
}

fn pulls(config: &Config) -> Result<Pulls> {
    let uid = config.qemu.helper_uid();
    let is_root = nix::unistd::geteuid().is_root();
    Ok(Pulls {
        layers: Layers::open(&config.state_dir, config.registry.cache_bytes_max)?,
        admission: Admission::fair("pulls", config.registry.pulls_max),
        helper: is_root.then_some(Credentials { uid, gid: uid }),
        config: config.registry.clone(),
    })
}
