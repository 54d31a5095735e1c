//! Creates VMs. A new VM is only a row; nothing boots here.

use super::access::Caller;
use super::call::to_value;
use super::capacity::Capacity;
use super::command_defaults;
use super::controls::Controls;
use super::core::Core;
use super::images::ImageService;
use super::kernels::KernelService;
use super::keys::HeldKey;
use super::locks::VmNames;
use super::names;
use super::network::Networks;
use super::operations::ended_row;
use super::ports::{PORT_TRIES_MAX, require_free, without_network};
use super::settings::check_restart;
use super::uses::UseGuard;
use crate::api::op::Op;
use crate::api::port::AutoPorts;
use crate::api::vm::{Init, Net, RateLimits, Vm, VmCreateRequest, VmReply, VmState};
use crate::config;
use crate::error::{Error, Kind, Result};
use crate::host::plural::count;
use crate::host::time::now_s;
use crate::ids::{ImageRef, VmId, VmName};
use crate::image::{Boots, ImageInfo};
use crate::ops::OpHandle;
use crate::store::{State, Ticket, Tx, VmRow, VmShape};

/// The most name servers that a resolver queries (resolv.conf(5)).
const NAME_SERVERS_MAX: usize = 3;
/// The most candidates for a generated name. Later candidates contain a number.
const NAME_TRIES_MAX: u32 = 64;

/// Creates VMs.
#[derive(Clone)]
pub struct Creator {
    pub(super) core: Core,
    pub(super) networks: Networks,
    pub(super) controls: Controls,
    pub(super) capacity: Capacity,
    pub(super) image_service: ImageService,
    pub(super) kernel_service: KernelService,
    /// The image, vCPUs and memory of a VM whose request does not set them.
    pub(super) defaults: config::VmDefaults,
}

impl Creator {
    /// Creates the VM. Its row is durable when this returns.
    pub fn create(&self, caller: &Caller, request: &VmCreateRequest) -> Result<Vm> {
        self.create_keyed(caller, request, None)
    }

    /// Like [`Self::create`], with an idempotency key. Key and row are written in one transaction,
    /// so the key never names a VM that does not exist.
    pub fn create_keyed(
        &self,
        caller: &Caller,
        request: &VmCreateRequest,
        key: Option<&HeldKey>,
    ) -> Result<Vm> {
        let name = request.image.as_ref().unwrap_or(&self.defaults.image);
        let image = self.image_service.use_image_for_vm(caller, name)?;
        self.create_from(caller, request, image, key)
    }

    /// Creates a VM from exactly this image. The guard prevents the image's deletion until the row
    /// names it.
    pub(super) fn create_from(
        &self,
        caller: &Caller,
        request: &VmCreateRequest,
        (image, _image): (ImageInfo, UseGuard<ImageRef>),
        key: Option<&HeldKey>,
    ) -> Result<Vm> {
        let row = VmRow {
            id: VmId::random(),
            // If the request has no name, `insert` replaces this one with a free name.
            name: request
                .name
                .clone()
                .unwrap_or_else(|| names::candidate(0, 0)),
            owner_uid: caller.uid,
            state: VmState::Created,
            shape: VmShape {
                image: image.name.clone(),
                image_digest: Some(image.shown_digest().to_owned()),
                kernel: request.kernel.clone().or_else(|| image.kernel.clone()),
                runtime: None,
                init: request.init.unwrap_or_default(),
                vcpus: request.vcpus.unwrap_or(self.defaults.vcpus),
                mem_mib: request.mem_mib.unwrap_or(self.defaults.mem_mib),
                disk_bytes: request.disk_bytes.unwrap_or(image.default_disk_bytes()),
                work_disk_bytes: request.work_disk_bytes,
                rates: RateLimits::default().with(&request.rates()),
                net: request.net.unwrap_or_default(),
                labels: request.labels.clone(),
                commands: command_defaults::checked(request)?,
            },
            // `insert_with_ports` sets the ports.
            ports: Vec::new(),
            auto_ports: auto_ports(request)?,
            host_name: request.host_name.clone(),
            dns: request.dns.clone(),
            rm: request.rm,
            restart: request.restart,
            created_at: now_s(),
            // `insert` sets the slot.
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
        check_init(row.shape.init, &image)?;
        check_restart(row.restart, row.rm)?;
        check_dns(&row)?;
        self.capacity.check_vcpus(row.shape.vcpus)?;
        self.capacity.check_memory(row.shape.mem_mib)?;
        self.capacity
            .check_disk(row.shape.disk_bytes, image.disk_bytes)?;
        request
            .work_disk_bytes
            .map_or(Ok(()), |bytes| self.capacity.check_work_disk(bytes))?;
        self.networks
            .check_ports(caller, row.shape.net, &request.ports)?;
        self.controls.check_rates(&request.rates())?;
        // This prevents the kernel's deletion until the row names it.
        let _kernel = row
            .shape
            .kernel
            .as_ref()
            .map(|name| self.kernel_service.use_kernel(name))
            .transpose()?;
        let id = row.id.clone();
        let op = key
            .map(|key| {
                self.core
                    .begin_own_op(key.method(), Some(id.clone()), caller.uid)
            })
            .transpose()?;
        let key_op = op.as_ref().map(OpHandle::op);
        let since = crate::sched::Instant::now();
        let made = self.insert_with_variables(&row, request, key.zip(key_op));
        if let Ok((_, ticket)) = &made
            && let Ok(row) = self.core.row(&id)
        {
            self.core.note(&row, Some(ticket.seq()), Some(since), || {
                super::history::What::Created
            });
        }
        let vm = made.and_then(|(vm, ticket)| self.core.wait_durable(ticket).map(|()| vm));
        match (op, &vm) {
            (Some(op), Ok(vm)) => drop(op.finish(to_value(&VmReply { vm: vm.clone() }))),
            (Some(op), Err(e)) => op.refuse(e),
            (None, _) => {}
        }
        vm
    }

    /// Writes the values of the variables to a file, because the row must not contain them, and
    /// then inserts the row. If the daemon dies in between, no row names the directory, so the next
    /// sweep removes it.
    fn insert_with_variables(
        &self,
        row: &VmRow,
        request: &VmCreateRequest,
        key: Option<(&HeldKey, Op)>,
    ) -> Result<(Vm, Ticket)> {
        let _beginning = self.core.beginning.begin_use(&row.id);
        let made = command_defaults::write(&self.core, &row.id, &request.env)
            .and_then(|()| self.insert_with_ports(row, request, key));
        if made.is_err() && !request.env.is_empty() {
            let dir = self.core.vm_dir(&row.id);
            if let Err(e) = crate::host::fs::remove_tree(&dir) {
                log::warn!("remove {}: {e}; retrying every minute", dir.display());
            }
        }
        made
    }

    /// Picks the ports and inserts the row. Only binding a socket shows whether a port is free, and
    /// no socket may be opened under `create_vm`. So the ports are picked before the lock is taken,
    /// and picked again if another VM takes one first.
    fn insert_with_ports(
        &self,
        row: &VmRow,
        request: &VmCreateRequest,
        key: Option<(&HeldKey, Op)>,
    ) -> Result<(Vm, Ticket)> {
        let mut tries = 0;
        loop {
            tries += 1;
            let row = VmRow {
                ports: self.networks.settle_ports(&request.ports)?,
                ..row.clone()
            };
            let made = {
                let _names = self.core.locks.create_vm.lock(&VmNames);
                self.insert_row(row, request.name.is_some(), key.clone())
            };
            match made {
                Err(e) if e.kind() == Kind::PortTaken && tries < PORT_TRIES_MAX => {}
                other => return other,
            }
        }
    }

    /// Inserts the row, and the key if there is one, in one transaction. The caller must hold
    /// `create_vm`.
    fn insert_row(
        &self,
        row: VmRow,
        name_given: bool,
        key: Option<(&HeldKey, Op)>,
    ) -> Result<(Vm, Ticket)> {
        self.core.store.change(|tx| {
            let row = self.insert(tx, row, name_given)?;
            // The view is made here, because the VM may be deleted before its row is durable.
            let vm = super::vm_view::view_of(tx, &row);
            if let Some((key, op)) = key {
                key.put(tx, &op.id)?;
                tx.put_op(ended_row(op, &to_value(&VmReply { vm: vm.clone() })));
            }
            Ok(vm)
        })
    }

    fn insert(&self, tx: &mut Tx, mut row: VmRow, name_given: bool) -> Result<VmRow> {
        let owned = tx.vms().filter(|r| r.owner_uid == row.owner_uid).count();
        let max = self.core.limits.vms_per_uid_max;
        if owned >= max {
            return Err(Error::new(
                Kind::VmLimit,
                format!(
                    "uid {} has {}, which is the limit",
                    row.owner_uid,
                    count(owned as u64, "VM")
                ),
            )
            .hint("delete some (fcctl ps -a, fcctl rm NAME), or raise limits.vms_per_uid_max"));
        }
        require_free(tx, &row.ports)?;
        row.name = if name_given {
            free_name(tx, row.name)?
        } else {
            some_name(tx, &row.id)?
        };
        row.slot = tx.free_slot(self.networks.slots_max())?;
        tx.insert_vm(row.clone())?;
        Ok(row)
    }
}

/// Fails if the image cannot boot with this init.
fn check_init(init: Init, image: &ImageInfo) -> Result<()> {
    if init == Init::Fcd || image.boots == Boots::Runtime {
        return Ok(());
    }
    let text = format!(
        "image {} was made by fcd image build or commit, and has no init but fcd's",
        image.name
    );
    Err(Error::new(Kind::Unsupported, text)
        .hint("omit --init, or use an image from a registry: fcctl help images"))
}

fn auto_ports(request: &VmCreateRequest) -> Result<Option<AutoPorts>> {
    if request.auto_ports && request.net == Some(Net::None) {
        return Err(without_network());
    }
    Ok(request.auto_ports.then(AutoPorts::default))
}

fn check_dns(row: &VmRow) -> Result<()> {
    if row.dns.len() > NAME_SERVERS_MAX {
        let text = format!(
            "a guest queries at most {NAME_SERVERS_MAX} name servers, and these are {}",
            row.dns.len()
        );
        return Err(Error::invalid(text).hint("leave some out"));
    }
    if row.shape.net == Net::None && !row.dns.is_empty() {
        let text = "a guest without a network cannot query name servers";
        return Err(Error::invalid(text).hint("use --net nat, or leave out --dns"));
    }
    Ok(())
}

fn free_name(state: &State, name: VmName) -> Result<VmName> {
    match state.vm_by_name(&name) {
        None => Ok(name),
        // The message does not reveal the owner.
        Some(_) => Err(Error::new(Kind::NameTaken, format!("the name {name} is taken"))
            .hint(format!("choose another name, or use it (fcctl ssh {name}), or delete it (fcctl rm -f {name})"))),
    }
}

fn some_name(state: &State, id: &VmId) -> Result<VmName> {
    let seed = u64::from_str_radix(id.as_str(), 16).unwrap_or_default();
    (0..NAME_TRIES_MAX)
        .map(|n| names::candidate(seed, n))
        .find(|name| state.vm_by_name(name).is_none())
        .ok_or_else(|| {
            Error::new(Kind::Exhausted, "no free name was found").hint("choose one with --name")
        })
}
