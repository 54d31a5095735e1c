//! Builds, lists and deletes images.
//!
//! A build is heavy: a root process and up to 6 GiB of memory. So `limits.builds_per_uid_max`
//! limits the builds in progress of each uid, and `limits.builds_max` limits the builds that run at
//! once. Further builds wait. A build reserves its name under `image_ops`, works without a lock,
//! and publishes the image by a rename that never replaces anything.
//!
//! An image belongs to the user who made it, and is private unless root or the daemon's own user
//! shares it. An image that they build from packages is shared from the start. Every other user has
//! names of their own ([`ImageRef::owner`]). Only its owner, root and the daemon's own user can
//! delete an image.

use super::access::Caller;
use super::call::{CallOutcome, to_value};
use super::core::Core;
use super::kernels::KernelService;
use super::spec::Specs;
use super::uses::{UseGuard, Uses};
use crate::api::image::{Image, ImageBuildRequest, ImageDeleteReply, ImageListReply, ImageReply};
use crate::api::page::{self, ListRequest};
use crate::error::{Error, Kind, Result};
use crate::host::plural::count;
use crate::host::{Commands, Credentials};
use crate::ids::ImageRef;
use crate::image::pull::Layers;
use crate::image::{BuildSpec, DISK_BYTES_DEFAULT, ImageInfo, Profile};
use crate::image::{DiskUse, GuestRuntimes, Images};
use crate::locks::{Cancel, CancelCause, Mutex};
use crate::ops::OpHandle;
use crate::pool::Admission;
use crate::sched::{HashMap, HashSet};
use crate::uids::UidCounts;
use serde_json::value::RawValue;
use std::sync::Arc;

/// The builds and pulls in progress, including those that wait.
#[derive(Default)]
pub(super) struct Builds {
    /// The names of the images that will be published.
    pub(super) names: HashMap<ImageRef, NameHolder>,
    /// The files of images that are about to be published, by name.
    pub(super) admitted: HashMap<ImageRef, AdmittedFiles>,
    /// The place of the next admission in the order of admissions.
    pub(super) next_admission: u64,
    pub(super) by_uid: UidCounts,
}

impl Builds {
    #[cfg(any(test, feature = "fakes"))]
    pub(super) fn len(&self) -> usize {
        self.names.len()
    }
}

/// The operation that will publish an image of a name.
#[derive(Clone)]
pub(super) struct NameHolder {
    pub uid: u32,
    /// Fires once the operation has ended and the name is free again.
    pub ended: Cancel,
}

/// The files of an image that is about to be published. They count against its user's limit.
#[derive(Clone)]
pub(super) struct AdmittedFiles {
    pub uid: u32,
    pub files: DiskUse,
    /// The place in the order of admissions.
    pub place: u64,
}

/// A build or pull in progress. It ends when this is dropped.
pub(super) struct Reserved {
    pub(super) builds: Arc<Mutex<Builds>>,
    /// The reserved name. A pull sets it once it knows the name of its image.
    pub(super) name: Option<ImageRef>,
    /// Prevents the deletion of a new image before its operation has read it back.
    pub(super) in_use: Option<UseGuard<ImageRef>>,
    pub(super) holder: NameHolder,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut builds = self.builds.lock();
        if let Some(name) = &self.name {
            builds.admitted.remove(name);
            builds.names.remove(name);
        }
        builds.by_uid.remove(self.holder.uid);
        drop(builds);
        // Release the image before the next holder of the name wakes up, because it may replace the
        // image.
        self.in_use = None;
        self.holder.ended.cancel(CancelCause::Finished);
    }
}

/// The parts that only pulls use.
#[derive(Clone)]
pub(super) struct Pulls {
    pub layers: Layers,
    pub admission: Admission,
    /// The uid and gid of the helper process, if the daemon is root.
    pub helper: Option<Credentials>,
    pub config: crate::config::Registry,
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
    pub(super) pulls: Pulls,
    pub(super) specs: Specs,
    pub(super) kernel_service: KernelService,
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
        let name = self.new_name(caller, &name)?;
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
            private: !caller.is_privileged(),
        };
        let reserved = self.reserve_build(caller, name.clone())?;
        let op = self.core.begin_op("image.build", None, caller.uid, true)?;
        if let Err(e) = self.core.persist_op(&op) {
            op.finish(Err(e.clone()));
            return Err(e);
        }
        let (id, service, caller) = (op.id().clone(), self.clone(), *caller);
        self.core.spawn(&format!("op-{id}"), move || {
            let _label = crate::locks::operation_scope(format!("image.build {name}"));
            let result = service
                .build_image(&op, &caller, &spec, &reserved)
                .map_err(|e| service.core.with_free_space(e))
                .and_then(|image| to_value(&ImageReply { image }));
            drop(reserved);
            service.core.end_op(op, result);
        })?;
        Ok(CallOutcome::Op(id))
    }

    /// Returns true if an image has this name, even a damaged one.
    pub(super) fn exists(&self, name: &ImageRef) -> bool {
        !self
            .images
            .get(name)
            .is_err_and(|e| e.kind() == Kind::ImageNotFound)
    }

    fn build_image(
        &self,
        op: &OpHandle,
        caller: &Caller,
        spec: &BuildSpec,
        reserved: &Reserved,
    ) -> Result<Image> {
        let _admitted = self
            .build_admission
            .enter(op.cancel(), |ahead| match ahead {
                0 => op.progress("wait for another build"),
                ahead => op.progress(&format!("wait for {} other builds", ahead + 1)),
            })?;
        self.bytes_left(caller)?;
        let reporter = op.reporter();
        let info = crate::image::build(
            &self.images,
            self.commands.as_ref(),
            spec,
            &mut |files| self.admit_files(caller, reserved, files),
            op.cancel(),
            &mut |stage, done, total| {
                reporter.progress(stage);
                reporter.progress_units(done, Some(total), "steps");
            },
        )?;
        self.build_runtime(op)?;
        Ok(info.to_api(spec.owner_uid, 0))
    }

    pub fn image_list(
        &self,
        caller: &Caller,
        request: &ListRequest,
    ) -> Result<ImageListReply<Box<RawValue>>> {
        let mut vms: HashMap<ImageRef, u64> = HashMap::default();
        self.core.store.read(|s| {
            s.vms()
                .for_each(|row| *vms.entry(row.shape.image.clone()).or_default() += 1)
        });
        let mut infos = self.images.list()?;
        infos.retain(|info| is_usable(caller, info));
        // Leave out each image of the host that an image of the caller hides, so that every listed
        // name refers to the image listed with it.
        let own: HashSet<ImageRef> = infos
            .iter()
            .filter(|info| info.name.owner() == Some(caller.uid))
            .map(|info| info.name.without_owner())
            .collect();
        infos.retain(|info| !own.contains(&info.name));
        let images = infos.iter().map(|info| {
            let vms = vms.get(&info.name).copied().unwrap_or(0);
            info.to_api(caller.uid, vms)
        });
        let mut images: Vec<Image> = images.collect();
        images.sort_by(|a, b| a.name.cmp(&b.name));
        let after = request.after.as_deref().unwrap_or_default();
        let rest = images
            .into_iter()
            .filter(|image| image.name.as_str() > after);
        let views = rest.map(|image| (image.name.to_string(), image));
        let (images, next) = page::fill(request.limit, views)?;
        Ok(ImageListReply { images, next })
    }

    /// Deletes an image. Root, the daemon's own user and the image's owner may delete it. An image
    /// cannot be deleted while a VM or a snapshot uses it, because VMs boot its kernel.
    ///
    /// # Errors
    /// `denied`, `image_not_found`, `conflict`, `busy`.
    pub fn image_delete(&self, caller: &Caller, name: &ImageRef) -> Result<ImageDeleteReply> {
        self.delete_exactly(caller, &self.resolve(caller, name))
    }

    /// Deletes the image of exactly this name.
    pub(super) fn delete_exactly(
        &self,
        caller: &Caller,
        name: &ImageRef,
    ) -> Result<ImageDeleteReply> {
        let doing = format!("delete image {}", name.said_by(caller.uid));
        // If there is no such image, return before the delete guard is taken. The guard would get
        // in the way of an image that is about to be published under this name.
        if let Err(e) = self.images.get(name)
            && e.kind() == Kind::ImageNotFound
        {
            return Err(e);
        }
        let _delete_guard = self.uses.begin_delete(name).ok_or_else(|| {
            Error::new(
                Kind::Busy,
                format!("{doing}: it is being made or deleted, or a VM is being created from it"),
            )
            .hint("try again in a moment: fcctl image list")
        })?;
        // The guard also prevents another user's image from getting the name after this check.
        self.check_owner(caller, name, &doing)?;
        self.check_unused(name, &doing)?;
        self.core.effects.before("delete the image")?;
        self.images.delete(name)?;
        Ok(ImageDeleteReply {
            deleted: name.said_by(caller.uid),
        })
    }

    /// Checks that no VM and no snapshot uses an image.
    pub(super) fn check_unused(&self, name: &ImageRef, doing: &str) -> Result<()> {
        let snapshots = self
            .core
            .store
            .read(|s| s.snapshots().filter(|row| row.shape.image == *name).count());
        let conflict = |users: String, hint| {
            let text = format!("{doing}: it is used by {users}");
            Err(Error::new(Kind::Conflict, text).hint(hint))
        };
        match (self.vms_of_image(name), snapshots) {
            (0, 0) => Ok(()),
            (0, snapshots) => conflict(
                count(snapshots as u64, "snapshot"),
                "delete them first: fcctl snapshot list, fcctl snapshot delete",
            ),
            (vms, _) => conflict(count(vms, "VM"), "delete them first: fcctl ps -a, fcctl rm"),
        }
    }

    pub(super) fn check_owner(&self, caller: &Caller, name: &ImageRef, doing: &str) -> Result<()> {
        if caller.is_privileged() {
            return Ok(());
        }
        let denied = |whose: String| {
            Err(Error::new(Kind::Denied, format!("{doing}: {whose}")).hint("ask root or its owner"))
        };
        match crate::image::owner_of(&self.images, name) {
            Ok(Some(uid)) if uid == caller.uid => Ok(()),
            Ok(Some(uid)) => denied(format!("it belongs to uid {uid}")),
            Ok(None) => denied("it belongs to the host".to_owned()),
            Err(e) if e.kind() == Kind::ImageNotFound => Err(e),
            // If the description of an image is damaged, its owner is unknown.
            Err(e) => denied(e.to_string()),
        }
    }

    pub(super) fn vms_of_image(&self, name: &ImageRef) -> u64 {
        self.core
            .store
            .read(|s| s.vms().filter(|row| row.shape.image == *name).count() as u64)
    }

    /// Returns the name of the image that the caller means: the caller's own image of this name, or
    /// else the host's. A name without a tag also matches the name with the tag `latest`. Prefers
    /// an image that the caller made or that is shared, because users of earlier versions could
    /// take names of the host.
    pub(super) fn resolve(&self, caller: &Caller, name: &ImageRef) -> ImageRef {
        let mut names = vec![name.clone(), name.with_default_tag()];
        if name.owner().is_none() {
            let own = name.owned_by(caller.uid);
            names.splice(..0, [own.clone(), own.with_default_tag()]);
        }
        let is_trusted = |name: &&ImageRef| {
            let info = self.images.get(name);
            info.is_ok_and(|info| is_trusted(caller, &info))
        };
        let mut found = names.iter().find(is_trusted);
        found = found.or_else(|| names.iter().find(|name| self.exists(name)));
        found.unwrap_or(name).clone()
    }

    /// Returns the image that the caller means, if the caller may use it.
    pub(super) fn find(&self, caller: &Caller, name: &ImageRef) -> Result<ImageInfo> {
        self.get(caller, &self.resolve(caller, name))
    }

    /// Returns the image of exactly this name.
    fn get(&self, caller: &Caller, name: &ImageRef) -> Result<ImageInfo> {
        let info = self.images.get(name)?;
        if is_usable(caller, &info) {
            return Ok(info);
        }
        let text = format!("image {name} belongs to another user");
        Err(Error::new(Kind::Denied, text).hint("pull or build one under another name"))
    }

    /// Returns the image of exactly this name. The guard prevents its deletion. A row must name the
    /// image before the guard is dropped.
    pub(super) fn use_image(
        &self,
        caller: &Caller,
        name: &ImageRef,
    ) -> Result<(ImageInfo, UseGuard<ImageRef>)> {
        let in_use = self.uses.begin_use(name).ok_or_else(|| {
            Error::new(
                Kind::ImageNotFound,
                format!("image {name} is being deleted"),
            )
            .hint("choose another: fcctl image list")
        })?;
        Ok((self.get(caller, name)?, in_use))
    }

    /// Returns the image that the creator of a VM means, with a guard. Root may see every image,
    /// but must not boot another user's image just because it has a name of the host.
    pub(super) fn use_image_for_vm(
        &self,
        caller: &Caller,
        name: &ImageRef,
    ) -> Result<(ImageInfo, UseGuard<ImageRef>)> {
        let (info, in_use) = self.use_image(caller, &self.resolve(caller, name))?;
        let is_explicit = name.owner().is_some();
        if is_explicit || is_trusted(caller, &info) {
            return Ok((info, in_use));
        }
        let whose = info
            .owner_uid
            .map_or_else(String::new, |uid| format!(" of uid {uid}"));
        let name = &info.name;
        let text = format!("image {name} is a private image{whose}");
        Err(Error::new(Kind::Denied, text).hint(format!(
            "to use it nevertheless, take it over: fcctl image tag {name} NAME"
        )))
    }
}

/// Returns true if the image was made by the caller or is shared.
fn is_trusted(caller: &Caller, info: &ImageInfo) -> bool {
    !info.private || info.owner_uid == Some(caller.uid)
}

/// Returns true if the caller may see the image.
pub(super) fn is_usable(caller: &Caller, info: &ImageInfo) -> bool {
    !info.private || caller.is_privileged() || info.owner_uid == Some(caller.uid)
}
