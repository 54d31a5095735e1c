//! Create and set: rows only; nothing boots here.

use super::operations::ended_row;
use super::ports::require_free;
use super::{Caller, Daemon, HeldKey, names, now_s, to_value};
use crate::api::op::Op;
use crate::api::vm::{Pending, RateLimits, Vm, VmCreateRequest, VmReply, VmSetRequest, VmState};
use crate::config::MEM_MIB_MIN;
use crate::disk::root::SIZE_UNIT_BYTES;
use crate::error::{Error, Kind, Result};
use crate::ids::{VmId, VmName};
use crate::ops::OpHandle;
use crate::store::{State, Ticket, Tx, VmRow};

/// What an ext4 file system with a journal takes.
const WORK_DISK_BYTES_MIN: u64 = 16 << 20;
/// How often ports are picked for a VM of which others take one at the same moment.
const PORT_TRIES_MAX: u32 = 16;
/// Candidates for a name before giving up; the later ones carry a random number.
const NAME_TRIES_MAX: u32 = 64;

impl Daemon {
    /// Makes the row, durable when this returns.
    pub fn create(&self, caller: &Caller, request: &VmCreateRequest) -> Result<Vm> {
        self.create_keyed(caller, request, None)
    }

    /// The same; the key comes with the row, so that it stands for this VM or for none.
    pub fn create_keyed(&self, caller: &Caller, request: &VmCreateRequest, key: Option<&HeldKey>) -> Result<Vm> {
        let image_name = request.image.clone().unwrap_or_else(|| self.config.vm.image.clone());
        // In use until the row names it.
        let (image, _image) = self.use_image(&image_name)?;
        let row = VmRow {
            id: VmId::random(),
            // Replaced below where none was given.
            name: request.name.clone().unwrap_or_else(|| names::candidate(0, 0)),
            owner_uid: caller.uid,
            state: VmState::Created,
            image: image_name,
            kernel: request.kernel.clone(),
            vcpus: request.vcpus.unwrap_or(self.config.vm.vcpus),
            mem_mib: request.mem_mib.unwrap_or(self.config.vm.mem_mib),
            disk_bytes: request.disk_bytes.unwrap_or(image.disk_bytes),
            work_disk_bytes: request.work_disk_bytes,
            rates: RateLimits::default().with(&request.rates()),
            net: request.net.unwrap_or_default(),
            // Settled below.
            ports: Vec::new(),
            rm: request.rm,
            created_at: now_s(),
            // Replaced below by the first free one.
            slot: 0,
            generation: 0,
            reason: None,
            pending: None,
            started_at: None,
            op: None,
            intent: None,
            identity: None,
            ssh_addr: None,
            tap: None,
            disk_driver: None,
            guest_version: 0,
            driver: None,
            host_key: None,
            synced: None,
            unresponsive: false,
            paused: false,
            has_balloon: false,
            balloon_mib: None,
        };
        self.check_vcpus(row.vcpus)?;
        self.check_memory(row.mem_mib)?;
        self.check_disk(row.disk_bytes, image.disk_bytes)?;
        request.work_disk_bytes.map_or(Ok(()), |bytes| self.check_work_disk(bytes))?;
        self.check_ports(caller, row.net, &request.ports)?;
        self.check_rates(&request.rates())?;
        // Until the row names it.
        let _kernel = row.kernel.as_ref().map(|name| self.use_kernel(name)).transpose()?;
        let id = row.id.clone();
        let op = key.map(|key| self.begin_own_op(key.method(), Some(id.clone()), caller.uid)).transpose()?;
        let begun = op.as_ref().map(OpHandle::op);
        let since = std::time::Instant::now();
        let made = self.insert_with_ports(&row, request, key.zip(begun));
        if let Ok((_, ticket)) = &made
            && let Ok(row) = self.row(&id)
        {
            self.note(&row, Some(ticket.seq()), Some(since), || super::history::What::Created);
        }
        let vm = made.and_then(|(vm, ticket)| self.wait_durable(ticket).map(|()| vm));
        match (op, &vm) {
            (Some(op), Ok(vm)) => drop(op.finish(to_value(&VmReply { vm: vm.clone() }))),
            (Some(op), Err(e)) => op.refuse(e),
            (None, _) => {}
        }
        vm
    }

    /// Sockets find out which ports are free, and under `create_vm` there is only memory. So the ports are picked first, and
    /// picked again if another VM got one of them meanwhile.
    fn insert_with_ports(&self, row: &VmRow, request: &VmCreateRequest, key: Option<(&HeldKey, Op)>) -> Result<(Vm, Ticket)> {
        let mut tries = 0;
        loop {
            tries += 1;
            let row = VmRow { ports: self.settle_ports(&request.ports)?, ..row.clone() };
            let made = {
                let _names = self.locks.create_vm.lock(&());
                self.insert_row(row, request.name.is_some(), key.clone())
            };
            match made {
                Err(e) if e.kind() == Kind::PortTaken && tries < PORT_TRIES_MAX => {}
                other => return other,
            }
        }
    }

    /// Needs `create_vm`.
    fn insert_row(&self, row: VmRow, name_given: bool, key: Option<(&HeldKey, Op)>) -> Result<(Vm, Ticket)> {
        self.store.change(|tx| {
            let row = self.insert(tx, row, name_given)?;
            // As it was made: somebody may have deleted it by the time that this is durable.
            let vm = super::access::view_of(tx, &row);
            if let Some((key, op)) = key {
                key.put(tx, &op.id)?;
                tx.put_op(ended_row(op, &to_value(&VmReply { vm: vm.clone() })));
            }
            Ok(vm)
        })
    }

    fn insert(&self, tx: &mut Tx, mut row: VmRow, name_given: bool) -> Result<VmRow> {
        let owned = tx.vms().filter(|r| r.owner_uid == row.owner_uid).count();
        let max = self.config.limits.vms_per_uid_max;
        if owned >= max {
            return Err(Error::new(Kind::VmLimit, format!("uid {} has {owned} VMs, the most that it may have", row.owner_uid))
                .hint("delete those you do not need (fcctl ps -a, fcctl rm NAME), or raise limits.vms_per_uid_max"));
        }
        require_free(tx, &row.ports)?;
        row.name = if name_given { free_name(tx, row.name)? } else { some_name(tx, &row.id)? };
        row.slot = tx.free_slot(self.slots_max())?;
        tx.insert_vm(row.clone())?;
        Ok(row)
    }

    pub(super) fn check_vcpus(&self, vcpus: u32) -> Result<()> {
        let max = self.config.limits.vcpus_max;
        if vcpus == 0 || vcpus > max {
            return Err(Error::invalid(format!("{vcpus} vcpus: give 1 to {max}")).hint("limits.vcpus_max sets the most"));
        }
        Ok(())
    }

    pub(super) fn check_memory(&self, mem_mib: u64) -> Result<()> {
        if mem_mib < MEM_MIB_MIN {
            return Err(Error::invalid(format!("{mem_mib} MiB of memory: a guest needs at least {MEM_MIB_MIN}"))
                .hint("give for instance --memory 1G"));
        }
        let max = self.mem_mib_max;
        if mem_mib > max {
            return Err(Error::new(Kind::MemoryLimit, format!("{mem_mib} MiB of memory: this host gives VMs at most {max}"))
                .hint("ask for less, or set limits.mem_mib_max"));
        }
        Ok(())
    }

    fn check_disk(&self, bytes: u64, at_least: u64) -> Result<()> {
        let max = self.config.limits.disk_bytes_max;
        if bytes < at_least {
            return Err(Error::invalid(format!(
                "a disk of {}: it needs at least {} and cannot shrink",
                size(bytes),
                size(at_least)
            ))
            .hint(format!("leave --disk out, or give at least --disk {}", size(at_least))));
        }
        if !bytes.is_multiple_of(SIZE_UNIT_BYTES) {
            return Err(Error::invalid(format!("a disk of {}: it must be a multiple of {}", size(bytes), size(SIZE_UNIT_BYTES)))
                .hint("give it in MiB, for instance --disk 4096M"));
        }
        if bytes > max {
            return Err(Error::invalid(format!("a disk of {}: at most {}", size(bytes), size(max)))
                .hint("limits.disk_bytes_max sets the most"));
        }
        Ok(())
    }

    fn check_work_disk(&self, bytes: u64) -> Result<()> {
        let max = self.config.limits.disk_bytes_max;
        if (WORK_DISK_BYTES_MIN..=max).contains(&bytes) && bytes.is_multiple_of(SIZE_UNIT_BYTES) {
            return Ok(());
        }
        let (least, most) = (size(WORK_DISK_BYTES_MIN), size(max));
        Err(Error::invalid(format!("a work disk of {}: give {least} to {most}, by whole MiB", size(bytes)))
            .hint("give it for instance as --work-disk 20G; limits.disk_bytes_max sets the most"))
    }

    /// Changes settings. They hold from the next start on, and of a VM that runs are pending until then; its rates it has at once if
    /// that is asked for.
    pub fn set(&self, caller: &Caller, request: &VmSetRequest) -> Result<Vm> {
        let row = self.resolve(caller, &request.vm)?;
        self.ensure_looked_at(&row, super::transitions::Verb::Set)?;
        let rates = request.rates();
        if !changes_size(request) && request.rm.is_none() && rates.is_empty() {
            return Err(Error::invalid(format!("set vm {}: nothing to set", row.name))
                .hint("give --vcpus, --memory, --disk, or a rate, as --disk-bps"));
        }
        request.vcpus.map_or(Ok(()), |n| self.check_vcpus(n))?;
        request.mem_mib.map_or(Ok(()), |n| self.check_memory(n))?;
        self.check_rates(&rates)?;
        let (row, is_live, ticket) = {
            let guard = self.locks.vm.lock(&row.id);
            let row = self.row(guard.key())?;
            self.allow_locked(&guard, &row, super::transitions::Verb::Set)?;
            let disk_now = row.pending.as_ref().and_then(|p| p.disk_bytes).unwrap_or(row.disk_bytes);
            request.disk_bytes.map_or(Ok(()), |n| self.check_disk(n, disk_now))?;
            let is_live = request.now && !is_at_rest(row.state);
            if is_live {
                self.may_adjust_locked(&guard, &row, request)?;
            }
            let ((), ticket) = self.store.change(|tx| tx.update_vm(&guard, |row| apply(row, request, is_live)))?;
            (row, is_live, ticket)
        };
        self.wait_durable(ticket)?;
        if is_live {
            self.adjust_rates(&row, &rates)?;
        }
        self.view(&row.id)
    }
}

/// As `--disk` takes it.
fn size(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    if bytes.is_multiple_of(MIB) { format!("{}M", bytes / MIB) } else { format!("{bytes} bytes") }
}

pub(super) fn is_at_rest(state: VmState) -> bool {
    matches!(state, VmState::Created | VmState::Stopped | VmState::Failed)
}

/// What a guest that runs cannot be given.
pub(super) fn changes_size(request: &VmSetRequest) -> bool {
    request.vcpus.is_some() || request.mem_mib.is_some() || request.disk_bytes.is_some()
}

/// vCPUs, memory and rates of a VM that is at rest change at once; the disk is grown by the next start.
fn apply(row: &mut VmRow, request: &VmSetRequest, is_live: bool) {
    row.rm = request.rm.unwrap_or(row.rm);
    let (rates, mut pending) = (request.rates(), row.pending.take().unwrap_or_default());
    pending.vcpus = request.vcpus.or(pending.vcpus);
    pending.mem_mib = request.mem_mib.or(pending.mem_mib);
    pending.disk_bytes = request.disk_bytes.or(pending.disk_bytes);
    let (given, waiting) = (rates.all(), pending.rates.all());
    if is_live {
        row.rates = row.rates.with(&rates);
        // What was to come later is overtaken.
        pending.rates = RateLimits::of(std::array::from_fn(|i| waiting[i].filter(|_| given[i].is_none())));
    } else {
        pending.rates = RateLimits::of(std::array::from_fn(|i| given[i].or(waiting[i])));
    }
    row.pending = Some(pending).filter(|p| *p != Pending::default());
    if is_at_rest(row.state) {
        take_pending(row);
    }
}

/// Makes the pending settings the VM's own.
pub(super) fn take_pending(row: &mut VmRow) {
    let Pending { vcpus, mem_mib, disk_bytes, rates } = row.pending.take().unwrap_or_default();
    row.vcpus = vcpus.unwrap_or(row.vcpus);
    row.mem_mib = mem_mib.unwrap_or(row.mem_mib);
    row.disk_bytes = disk_bytes.unwrap_or(row.disk_bytes);
    row.rates = row.rates.with(&rates);
}

fn free_name(state: &State, name: VmName) -> Result<VmName> {
    match state.vm_by_name(&name) {
        None => Ok(name),
        // Whose it is, is not said.
        Some(_) => Err(Error::new(Kind::NameTaken, format!("the name {name} is taken"))
            .hint(format!("pick another name, enter it with fcctl ssh {name}, or delete it with fcctl rm -f {name}"))),
    }
}

fn some_name(state: &State, id: &VmId) -> Result<VmName> {
    let seed = u64::from_str_radix(id.as_str(), 16).unwrap_or_default();
    (0..NAME_TRIES_MAX)
        .map(|n| names::candidate(seed, n))
        .find(|name| state.vm_by_name(name).is_none())
        .ok_or_else(|| Error::new(Kind::Exhausted, "no free name was found").hint("give one with --name"))
}

/// Memory of the VMs that have some: those on their way up, up, or on their way down.
/// Without `apart`, which asks anew.
fn reserved_mib(state: &State, owner_uid: Option<u32>, apart: &VmId) -> u64 {
    state
        .vms()
        .filter(|r| matches!(r.state, VmState::Starting | VmState::Running | VmState::Stopping))
        .filter(|r| r.id != *apart)
        .filter(|r| owner_uid.is_none_or(|uid| uid == r.owner_uid))
        .map(|r| r.mem_mib)
        .sum()
}

impl Daemon {
    /// Memory is reserved at claim: the sum over started VMs stays below the limits.
    pub(super) fn reserve_memory(&self, state: &State, row: &VmRow) -> Result<()> {
        let check = |used: u64, max: u64, whose: &str, key: &str| {
            if used + row.mem_mib <= max {
                return Ok(());
            }
            Err(Error::new(Kind::MemoryLimit, format!("{} MiB more memory: {used} of {whose} {max} MiB are in use", row.mem_mib))
                .hint(format!("stop another VM, give it less with fcctl vm set, or raise limits.{key}")))
        };
        check(reserved_mib(state, None, &row.id), self.mem_mib_max, "this host's", "mem_mib_max")?;
        match self.config.limits.mem_mib_per_uid_max {
            0 => Ok(()),
            max => check(reserved_mib(state, Some(row.owner_uid), &row.id), max, "the owner's", "mem_mib_per_uid_max"),
        }
    }
}
