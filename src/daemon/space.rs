//! Answers `fcd.space`: the disk space that VMs, images, cached layers, guest runtimes, kernels and
//! snapshots use, and how much of it can be freed. The sizes come from the store and from the
//! files. No lock is held.

use super::access::Caller;
use super::images::{ImageService, is_usable};
use super::rules::is_at_rest;
use super::snapshot_registry::allocated_bytes;
use crate::api::daemon::{SpaceKind, SpaceReply, SpaceUse};
use crate::error::Result;
use crate::ids::{ImageRef, RuntimeId};
use crate::image::DiskUse;
use crate::sched::HashSet;
use crate::store::VmRow;
use std::sync::Arc;

/// The most names of one kind in the reply, so that it fits a message.
const NAMES_MAX: usize = 1000;

/// The images and runtimes that VMs and snapshots use.
struct InUse {
    images: HashSet<ImageRef>,
    runtimes: HashSet<RuntimeId>,
}

impl ImageService {
    /// Returns the space that each kind uses. For an ordinary user, counts what belongs to that
    /// user and what serves all users. Space is reclaimable if nothing needs it and the caller may
    /// free it.
    pub fn space(&self, caller: &Caller) -> Result<SpaceReply> {
        let in_use = self.in_use();
        Ok(SpaceReply {
            kinds: vec![
                self.vm_space(caller),
                self.image_space(caller, &in_use)?,
                self.layer_space(caller)?,
                self.runtime_space(caller, &in_use)?,
                self.kernel_space()?,
                self.snapshot_space(caller),
            ],
        })
    }

    /// Returns how root disks are made on this host, or None if they cannot be made.
    pub fn disk_driver(&self) -> Option<&'static str> {
        let probe = (*self.specs.disk_probe).as_ref().ok();
        probe.map(|probe| probe.method.name())
    }

    fn in_use(&self) -> InUse {
        self.core.store.read(|s| {
            let shapes = || {
                let of_vms = s.vms().map(|row| &row.shape);
                of_vms.chain(s.snapshots().map(|row| &row.shape))
            };
            // A VM at rest boots with the newest runtime at its next start.
            let running = s.vms().filter(|row| !is_at_rest(row.state));
            let running = running.map(|row| &row.shape);
            let booted = running.chain(s.snapshots().map(|row| &row.shape));
            InUse {
                images: shapes().map(|shape| shape.image.clone()).collect(),
                runtimes: booted.filter_map(|shape| shape.runtime.clone()).collect(),
            }
        })
    }

    fn vm_space(&self, caller: &Caller) -> SpaceUse {
        let rows: Vec<Arc<VmRow>> = self.core.store.read(|s| {
            let seen = s.vms().filter(|row| caller.may_see(row.owner_uid));
            seen.cloned().collect()
        });
        let mut space = SpaceUse::new(SpaceKind::Vms);
        for row in rows {
            let bytes = allocated_bytes(&self.core.vm_dir(&row.id));
            let is_active = !is_at_rest(row.state);
            space.add(bytes, is_active);
            if !is_active && row.owner_uid == caller.uid {
                space.reclaimable_bytes += bytes;
            }
        }
        space
    }

    /// Counts a file once, even if several images share it.
    fn image_space(&self, caller: &Caller, in_use: &InUse) -> Result<SpaceUse> {
        let mut space = SpaceUse::new(SpaceKind::Images);
        let (mut all, mut kept) = (DiskUse::default(), DiskUse::default());
        for info in self.images.list()? {
            if !is_usable(caller, &info) {
                continue;
            }
            let files = DiskUse::of_directory(&info.dir)?;
            let is_used = in_use.images.contains(&info.name);
            space.add(0, is_used);
            all.add(&files);
            if is_used || info.owner_uid != Some(caller.uid) {
                kept.add(&files);
            } else if space.reclaimable.len() < NAMES_MAX {
                let name = info.name.said_by(caller.uid);
                space.reclaimable.push(name.to_string());
            }
        }
        space.bytes = all.bytes();
        space.reclaimable_bytes = all.bytes().saturating_sub(kept.bytes());
        Ok(space)
    }

    fn layer_space(&self, caller: &Caller) -> Result<SpaceUse> {
        let cached = self.pulls.layers.used()?;
        let mut space = SpaceUse {
            count: cached.layers,
            bytes: cached.bytes,
            ..SpaceUse::new(SpaceKind::Layers)
        };
        if caller.is_privileged() {
            space.reclaimable_bytes = cached.bytes;
        }
        Ok(space)
    }

    fn runtime_space(&self, caller: &Caller, in_use: &InUse) -> Result<SpaceUse> {
        let mut space = SpaceUse::new(SpaceKind::Runtimes);
        // The first is the newest, which the next boot uses.
        for (place, runtime) in self.guest_runtimes.list()?.into_iter().enumerate() {
            let is_active = place == 0 || in_use.runtimes.contains(&runtime.id);
            space.add(runtime.bytes, is_active);
            if !is_active && caller.is_privileged() {
                space.reclaimable_bytes += runtime.bytes;
                space.reclaimable.push(runtime.id.to_string());
            }
        }
        space.reclaimable.truncate(NAMES_MAX);
        Ok(space)
    }

    /// Reports no kernel as reclaimable. A kernel is deleted only by name, because somebody
    /// imported it on purpose.
    fn kernel_space(&self) -> Result<SpaceUse> {
        let mut space = SpaceUse::new(SpaceKind::Kernels);
        for kernel in self.kernel_service.kernels.list()? {
            let is_used = self.core.store.read(|s| {
                let of_vms = s.vms().map(|row| &row.shape);
                let mut shapes = of_vms.chain(s.snapshots().map(|row| &row.shape));
                shapes.any(|shape| shape.kernel.as_ref() == Some(&kernel.name))
            });
            space.add(kernel.bytes, is_used);
        }
        Ok(space)
    }

    /// Reports no snapshot as reclaimable. Like a kernel, a snapshot is deleted only by name.
    fn snapshot_space(&self, caller: &Caller) -> SpaceUse {
        let mut space = SpaceUse::new(SpaceKind::Snapshots);
        self.core.store.read(|s| {
            let seen = s.snapshots().filter(|row| caller.may_see(row.owner_uid));
            seen.for_each(|row| space.add(row.bytes, s.vm(&row.vm).is_some()));
        });
        space
    }
}
