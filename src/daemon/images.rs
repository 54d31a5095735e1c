//! Builds, lists and deletes images.
//!
//! A build is heavy: a root process and up to 6 GiB of memory. So `limits.builds_per_uid_max`
//! limits the builds in progress of each uid, and `limits.builds_max` limits the builds that run at
//! once. Further builds wait. A build reserves its name under `image_ops`, works without a lock,
//! and publishes the image by a rename that never replaces anything.
//!
//! An image belongs to the user who built it. Everybody can create VMs from it. Only its owner,
//! root and the daemon's own user can delete it.

use super::access::Caller;
use super::call::{CallOutcome, to_value};
use super::core::Core;
use super::spec::Specs;
use super::uses::{UseGuard, Uses};
use crate::api::image::{Image, ImageBuildRequest, ImageDeleteReply, ImageListReply, ImageReply};
use crate::api::page::{self, ListRequest};
use crate::error::{Error, Kind, Result};
use crate::host::Commands;
use crate::host::plural::count;
use crate::ids::ImageRef;
use crate::image::{BuildSpec, DISK_BYTES_DEFAULT, ImageInfo, Profile};
use crate::image::{GuestRuntimes, Images};
use crate::locks::Mutex;
use crate::ops::OpHandle;
use crate::pool::Admission;
use crate::uids::UidCounts;
use serde_json::value::RawValue;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// The builds in progress, including those that wait.
#[derive(Default)]
pub(super) struct Builds {
    names: HashSet<ImageRef>,
    by_uid: UidCounts,
}

impl Builds {
    #[cfg(any(test, feature = "fakes"))]
    pub(super) fn len(&self) -> usize {
        self.names.len()
    }
}

/// A build in progress. It ends when this is dropped.
pub(super) struct Reserved {
    builds: Arc<Mutex<Builds>>,
    name: ImageRef,
    uid: u32,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut builds = self.builds.lock();
        builds.names.remove(&self.name);
        builds.by_uid.remove(self.uid);
    }
}

/// The operations on images.
#[derive(Clone)]
pub struct ImageService {
    pub(super) core: Core,
    pub(super) commands: Arc<dyn Commands>,
    pub(super) images: Images,
    pub(super) guest_runtimes: GuestRuntimes,
    pub(super) uses: Uses<ImageRef>,
    pub(super) builds: Arc<Mutex<Builds>>,
    pub(super) build_admission: Admission,
    pub(super) specs: Specs,
    /// The name of an image whose build request has no name.
    pub(super) default_image: ImageRef,
}

impl ImageService {
    /// Begins to build an image. Any caller may build images.
    pub fn image_build(&self, caller: &Caller, request: &ImageBuildRequest) -> Result<CallOutcome> {
        let name = request
            .name
            .clone()
            .unwrap_or_else(|| self.default_image.clone());
        let include = request.include.clone();
        let spec = BuildSpec {
            name: name.clone(),
            include,
            profile: if request.minimal {
                Profile::Minimal
            } else {
                Profile::Full
            },
            disk_bytes: DISK_BYTES_DEFAULT,
            owner_uid: caller.uid,
        };
        let reserved = self.reserve_build(caller, name)?;
        let op = self.core.begin_op("image.build", None, caller.uid, true)?;
        if let Err(e) = self.core.persist_op(&op) {
            op.finish(Err(e.clone()));
            return Err(e);
        }
        let (id, service) = (op.id().clone(), self.clone());
        self.core.spawn(&format!("op-{id}"), move || {
            let _label = crate::locks::operation_scope(format!("image.build {}", reserved.name));
            let result = service
                .build_image(&op, &spec)
                .and_then(|image| to_value(&ImageReply { image }));
            drop(reserved);
            service.core.end_op(op, result);
        })?;
        Ok(CallOutcome::Op(id))
    }

    pub(super) fn reserve_build(&self, caller: &Caller, name: ImageRef) -> Result<Reserved> {
        // A damaged image also occupies its name.
        if !self
            .images
            .get(&name)
            .is_err_and(|e| e.kind() == Kind::ImageNotFound)
        {
            return Err(
                Error::new(Kind::NameTaken, format!("the image {name} exists already"))
                    .hint("images never change, so choose another name: fcctl image build NAME"),
            );
        }
        let stored = if caller.is_privileged() {
            0
        } else {
            self.stored_images(caller.uid)?
        };
        let limits = &self.core.limits;
        let _images = self.core.locks.image_ops.lock(&());
        let mut builds = self.builds.lock();
        let running = builds.by_uid.of(caller.uid);
        if running >= limits.builds_per_uid_max {
            let text = format!(
                "build image {name}: you have {} in progress, which is the limit",
                count(running as u64, "build")
            );
            return Err(Error::new(Kind::Busy, text)
                .hint("wait for one to end or cancel one (fcctl op list, fcctl op cancel)"));
        }
        if stored + running >= limits.images_per_uid_max {
            let text = format!(
                "build image {name}: you have {}, which is the limit",
                count(stored as u64, "image")
            );
            return Err(Error::new(Kind::Exhausted, text).hint("delete one: fcctl image rm NAME"));
        }
        if !builds.names.insert(name.clone()) {
            return Err(
                Error::new(Kind::Busy, format!("image {name} is being built"))
                    .hint("fcctl op list"),
            );
        }
        builds.by_uid.add(caller.uid);
        Ok(Reserved {
            builds: self.builds.clone(),
            name,
            uid: caller.uid,
        })
    }

    fn stored_images(&self, uid: u32) -> Result<usize> {
        Ok(self
            .images
            .list()?
            .iter()
            .filter(|info| info.owner_uid == Some(uid))
            .count())
    }

    fn build_image(&self, op: &OpHandle, spec: &BuildSpec) -> Result<Image> {
        let _admitted = self
            .build_admission
            .enter(op.cancel(), |ahead| match ahead {
                0 => op.progress("wait for another build"),
                ahead => op.progress(&format!("wait for {} other builds", ahead + 1)),
            })?;
        let reporter = op.reporter();
        let info = crate::image::build(
            &self.images,
            self.commands.as_ref(),
            spec,
            op.cancel(),
            &mut |stage, done, total| {
                reporter.progress(stage);
                reporter.progress_units(done, Some(total), "steps");
            },
        )?;
        crate::image::runtime::ensure(
            &self.guest_runtimes,
            self.commands.as_ref(),
            op.cancel(),
            &mut |stage, done, total| {
                reporter.progress(&format!("guest runtime: {stage}"));
                reporter.progress_units(done, Some(total), "steps");
            },
        )?;
        Ok(info.to_api(0))
    }

    pub fn image_list(&self, request: &ListRequest) -> Result<ImageListReply<Box<RawValue>>> {
        let mut vms: HashMap<ImageRef, u64> = HashMap::new();
        self.core.store.read(|s| {
            s.vms()
                .for_each(|row| *vms.entry(row.shape.image.clone()).or_default() += 1)
        });
        let mut infos = self.images.list()?;
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        let rest = infos.into_iter().filter(|info| {
            request
                .after
                .as_deref()
                .is_none_or(|after| info.name.as_str() > after)
        });
        let views = rest.map(|info| {
            (
                info.name.to_string(),
                info.to_api(vms.get(&info.name).copied().unwrap_or(0)),
            )
        });
        let (images, next) = page::fill(request.limit, views)?;
        Ok(ImageListReply { images, next })
    }

    /// Deletes an image. Root, the daemon's own user and the user who built the image may delete
    /// it. An image cannot be deleted while a VM or a snapshot uses it, because VMs boot its
    /// kernel.
    ///
    /// # Errors
    /// `denied`, `image_not_found`, `conflict`, `busy`.
    pub fn image_delete(&self, caller: &Caller, name: &ImageRef) -> Result<ImageDeleteReply> {
        self.check_owner(caller, name)?;
        let doing = format!("delete image {name}");
        let _delete_guard = self.uses.begin_delete(name).ok_or_else(|| {
            Error::new(
                Kind::Busy,
                format!("{doing}: it is being deleted, or a VM is being created from it"),
            )
            .hint("try again in a moment: fcctl image list")
        })?;
        let snapshots = self
            .core
            .store
            .read(|s| s.snapshots().filter(|row| row.shape.image == *name).count());
        match (self.vms_of_image(name), snapshots) {
            (0, 0) => self.images.delete(name).map(|()| ImageDeleteReply {
                deleted: name.clone(),
            }),
            (0, snapshots) => Err(Error::new(
                Kind::Conflict,
                format!(
                    "{doing}: it is used by {}",
                    count(snapshots as u64, "snapshot")
                ),
            )
            .hint("delete them first: fcctl snapshot list, fcctl snapshot delete")),
            (vms, _) => Err(Error::new(
                Kind::Conflict,
                format!("{doing}: it is used by {}", count(vms, "VM")),
            )
            .hint("delete them first: fcctl ps -a, fcctl rm")),
        }
    }

    fn check_owner(&self, caller: &Caller, name: &ImageRef) -> Result<()> {
        if caller.is_privileged() {
            return Ok(());
        }
        let denied = |whose: String| {
            Err(
                Error::new(Kind::Denied, format!("delete image {name}: {whose}"))
                    .hint("ask root or its owner"),
            )
        };
        match self.images.get(name) {
            Ok(info) if info.owner_uid == Some(caller.uid) => Ok(()),
            Ok(ImageInfo {
                owner_uid: Some(uid),
                ..
            }) => denied(format!("uid {uid} built it")),
            Ok(ImageInfo {
                owner_uid: None, ..
            }) => denied("it belongs to the host".to_owned()),
            Err(e) if e.kind() == Kind::ImageNotFound => Err(e),
            // Nobody knows who built a damaged image.
            Err(e) => denied(e.to_string()),
        }
    }

    fn vms_of_image(&self, name: &ImageRef) -> u64 {
        self.core
            .store
            .read(|s| s.vms().filter(|row| row.shape.image == *name).count() as u64)
    }

    /// Returns the image with this name or, if the name has no tag, with the tag `latest`. The
    /// guard prevents the image's deletion. A row must name the image before the guard is dropped.
    pub(super) fn use_image(&self, name: &ImageRef) -> Result<(ImageInfo, UseGuard<ImageRef>)> {
        match self.use_named(name) {
            Err(e) if e.kind() == Kind::ImageNotFound && name.with_default_tag() != *name => {
                self.use_named(&name.with_default_tag()).map_err(|_| e)
            }
            found => found,
        }
    }

    fn use_named(&self, name: &ImageRef) -> Result<(ImageInfo, UseGuard<ImageRef>)> {
        let in_use = self.uses.begin_use(name).ok_or_else(|| {
            Error::new(
                Kind::ImageNotFound,
                format!("image {name} is being deleted"),
            )
            .hint("choose another: fcctl image list")
        })?;
        Ok((self.images.get(name)?, in_use))
    }
}
