//! Reserves a place among the user's operations, a name and space for each image that is being
//! made. The name is reserved in memory, under `image_ops`; files are touched without a lock.
//!
//! How much space an image takes is known only once it is complete. So the limit of its user is
//! checked right before it is published. From this check on, until the operation ends, the files of
//! the image count in every other check. Two images that are published at the same time can
//! therefore not exceed the limit together.

use super::access::Caller;
use super::images::{AdmittedFiles, ImageService, NameHolder, Reserved};
use super::locks::ImageNames;
use crate::error::{Error, Kind, Result};
use crate::host::plural::count;
use crate::ids::ImageRef;
use crate::image::DiskUse;
use crate::locks::Cancel;
use crate::sched::HashMap;

pub(super) const DELETE_HINT: &str = "delete an image: fcctl image rm NAME";

impl Reserved {
    /// Reserves a name. If another operation holds the name, returns that operation instead.
    pub(super) fn hold(&mut self, name: &ImageRef) -> Option<NameHolder> {
        let mut builds = self.builds.lock();
        if let Some(holder) = builds.names.get(name) {
            return Some(holder.clone());
        }
        builds.names.insert(name.clone(), self.holder.clone());
        self.name = Some(name.clone());
        None
    }

    /// Allows the deletion of the published image, whose files now count like those of any other
    /// image.
    pub(super) fn end_publication(&mut self) {
        if let Some(name) = &self.name {
            self.builds.lock().admitted.remove(name);
        }
        self.in_use = None;
    }
}

/// Work that has begun, and how many operations its user had in progress before.
struct BegunWork {
    reserved: Reserved,
    running_before: usize,
}

pub(super) fn name_is_busy(name: &ImageRef) -> Error {
    let text = format!("image {} is being made or copied", name.without_owner());
    Error::new(Kind::Busy, text).hint("fcctl op list")
}

impl ImageService {
    /// Returns the full name of a new image that the caller names `name`. Root and the daemon's own
    /// user give names of the host. Every other user has separate names, so no user can take a name
    /// away from another.
    pub(super) fn new_name(&self, caller: &Caller, name: &ImageRef) -> Result<ImageRef> {
        if let Some(uid) = name.owner()
            && (uid != caller.uid || caller.is_privileged())
        {
            let text = format!("image name {name}: a new image cannot have an owner in its name");
            let hint = format!("use the name {}", name.without_owner());
            return Err(Error::invalid(text).hint(hint));
        }
        Ok(match caller.is_privileged() {
            true => name.clone(),
            false => name.owned_by(caller.uid),
        })
    }

    pub(super) fn reserve_build(&self, caller: &Caller, name: ImageRef) -> Result<Reserved> {
        let doing = format!("build image {name}");
        let max = self.core.limits.builds_per_uid_max;
        let mut reserved = self.reserve(caller, max).map_err(|e| e.context(doing))?;
        self.reserve_new_name(&mut reserved, name)?;
        Ok(reserved)
    }

    /// Fails if an image has this name. The caller has reserved the name, so no other operation can
    /// publish an image of this name after the check.
    fn require_free(&self, name: &ImageRef) -> Result<()> {
        // A damaged image also occupies its name.
        if !self.exists(name) {
            return Ok(());
        }
        let text = format!("the image {} exists already", name.without_owner());
        Err(Error::new(Kind::NameTaken, text)
            .hint("images never change, so choose another name, or see fcctl image list"))
    }

    /// Begins a build or pull, of which a user may have `max` in progress. The user's images are
    /// counted after the work has begun, because an image that another operation publishes in the
    /// meantime must be counted at least once.
    pub(super) fn reserve(&self, caller: &Caller, max: usize) -> Result<Reserved> {
        let begun = self.begin_work(caller, max)?;
        let stored = if caller.is_privileged() {
            0
        } else {
            self.stored_images(caller.uid)?
        };
        if stored + begun.running_before < self.core.limits.images_per_uid_max {
            return Ok(begun.reserved);
        }
        let text = format!(
            "you have {}, which is the limit",
            count(stored as u64, "image")
        );
        Err(Error::new(Kind::Exhausted, text).hint("delete one: fcctl image rm NAME"))
    }

    /// Like [`Self::reserve`], but for work that adds no image.
    pub(super) fn reserve_work(&self, caller: &Caller, max: usize) -> Result<Reserved> {
        self.begin_work(caller, max).map(|begun| begun.reserved)
    }

    fn begin_work(&self, caller: &Caller, max: usize) -> Result<BegunWork> {
        let ended = Cancel::try_new().map_err(|e| Error::io("make a cancel token", e))?;
        let _images = self.core.locks.image_ops.lock(&ImageNames);
        let mut builds = self.builds.lock();
        let running = builds.by_uid.of(caller.uid);
        if running >= max {
            let text = format!(
                "you have {} in progress, which is the limit",
                count(running as u64, "image")
            );
            return Err(Error::new(Kind::Busy, text)
                .hint("wait for one to end or cancel one (fcctl op list, fcctl op cancel)"));
        }
        builds.by_uid.add(caller.uid);
        let reserved = Reserved {
            builds: self.builds.clone(),
            name: None,
            in_use: None,
            holder: NameHolder {
                uid: caller.uid,
                ended,
            },
        };
        Ok(BegunWork {
            reserved,
            running_before: running,
        })
    }

    /// Reserves the name of an image that does not exist yet, and [keeps](Self::keep) the image.
    pub(super) fn reserve_new_name(&self, reserved: &mut Reserved, name: ImageRef) -> Result<()> {
        self.reserve_name(reserved, name.clone())?;
        self.keep(reserved, &name)?;
        self.require_free(&name)
    }

    /// Prevents the deletion of an image from its publication until the reservation ends. Otherwise
    /// the operation could report that the image it has made does not exist.
    pub(super) fn keep(&self, reserved: &mut Reserved, name: &ImageRef) -> Result<()> {
        let in_use = self.uses.begin_use(name).ok_or_else(|| {
            let text = format!("image {name} is being deleted");
            Error::new(Kind::Busy, text).hint("try again in a moment")
        })?;
        reserved.in_use = Some(in_use);
        Ok(())
    }

    /// Reserves the name of the image that will be published.
    pub(super) fn reserve_name(&self, reserved: &mut Reserved, name: ImageRef) -> Result<()> {
        let _images = self.core.locks.image_ops.lock(&ImageNames);
        match reserved.hold(&name) {
            None => Ok(()),
            Some(_) => Err(name_is_busy(&name)),
        }
    }

    /// Returns the space that the caller's images may still take.
    ///
    /// # Errors
    /// `exhausted` if there is none left.
    pub(super) fn bytes_left(&self, caller: &Caller) -> Result<u64> {
        let max = self.core.limits.disk_bytes_max;
        if caller.is_privileged() {
            return Ok(max);
        }
        let used = self.bytes_used(caller.uid, u64::MAX)?;
        let limit = self.pulls.config.image_bytes_per_uid_max;
        match limit.saturating_sub(used) {
            0 => {
                let text = format!("your images take {used} bytes, the limit is {limit}");
                Err(Error::new(Kind::Exhausted, text).hint(DELETE_HINT))
            }
            left => Ok(left.min(max)),
        }
    }

    /// Decides whether an image with these files may be published under the reserved name. If so,
    /// the files count until the reservation ends.
    ///
    /// # Errors
    /// `exhausted` if the caller's images would take more than they may.
    pub(super) fn admit_files(
        &self,
        caller: &Caller,
        reserved: &Reserved,
        files: DiskUse,
    ) -> Result<()> {
        if caller.is_privileged() {
            return Ok(());
        }
        let name = reserved.name.as_ref();
        let name = name.ok_or_else(|| Error::internal("no name is reserved"))?;
        let uid = caller.uid;
        let place = {
            let mut builds = self.builds.lock();
            let place = builds.next_admission;
            builds.next_admission += 1;
            let admitted = AdmittedFiles { uid, files, place };
            builds.admitted.insert(name.clone(), admitted);
            place
        };
        // If two operations are admitted at the same time, only the later one counts the files of
        // both.
        let used = self.bytes_used(uid, place);
        let limit = self.pulls.config.image_bytes_per_uid_max;
        if used.as_ref().is_ok_and(|used| *used <= limit) {
            return Ok(());
        }
        self.builds.lock().admitted.remove(name);
        let text = format!(
            "your images would take {} bytes, the limit is {limit}",
            used?
        );
        Err(Error::new(Kind::Exhausted, text).hint(DELETE_HINT))
    }

    /// Returns the space that a user's images take. This includes images that are about to be
    /// published if their place in the order of admissions is at most `last_place`. An image that
    /// will be replaced does not count.
    fn bytes_used(&self, uid: u32, last_place: u64) -> Result<u64> {
        // The admissions are copied before the images are listed. So an image whose publication
        // ends meanwhile is in the copy or in the list.
        let admitted: HashMap<ImageRef, AdmittedFiles> = {
            let builds = self.builds.lock();
            let all = builds.admitted.iter();
            let own = all.filter(|(_, admitted)| admitted.uid == uid);
            own.map(|(name, admitted)| (name.clone(), admitted.clone()))
                .collect()
        };
        let mut used = DiskUse::default();
        for info in self.images.list()? {
            if info.owner_uid == Some(uid) && !admitted.contains_key(&info.name) {
                used.add(&DiskUse::of_directory(&info.dir)?);
            }
        }
        let earlier = admitted.values().filter(|own| own.place <= last_place);
        earlier.for_each(|own| used.add(&own.files));
        Ok(used.bytes())
    }

    fn stored_images(&self, uid: u32) -> Result<usize> {
        Ok(self
            .images
            .list()?
            .iter()
            .filter(|info| info.owner_uid == Some(uid))
            .count())
    }
}
