//! The section `[limits]`: quotas per user and for all users, and how long things may take.

use super::section::section;
use crate::uids::{RETENTION, Retention};

section! {
    /// Quotas, timeouts and bounds. Memory is in MiB, times are in seconds.
    pub struct Limits {
        /// VMs that boot at the same time. 0 means the number of cores.
        boots_max: usize = 0,
        /// Threads that copy data to and from guests.
        pool_workers: usize = 8,
        /// How many of these threads one user may occupy. 0 means three quarters, and at least one.
        pool_workers_per_uid_max: usize = 0,
        /// Transfers that may wait for a thread. More are refused.
        pool_queue: usize = 64,
        /// Connections to the socket.
        connections_max: usize = 512,
        /// Connections of one user.
        connections_per_uid_max: usize = 128,
        /// Connections reserved for root.
        connections_root_reserved: usize = 4,
        /// Operations of one user in progress.
        operations_per_uid_max: usize = 64,
        /// Finished operations of one user that `fcctl op list --all` still shows.
        operations_kept_per_uid: usize = RETENTION.per_uid_max,
        /// Finished operations of all users that are kept. Above this limit, the oldest one of the
        /// user with the most is removed. Those of root are removed last.
        operations_kept_max: usize = RETENTION.total_max,
        /// Transfers of one user that may wait for a thread.
        queue_per_uid_max: usize = 32,
        /// VMs of one user.
        vms_per_uid_max: usize = 64,
        /// Image builds that run at the same time. Others wait.
        builds_max: usize = 1,
        /// Image builds of one user, running and waiting.
        builds_per_uid_max: usize = 1,
        /// Images that one user may have built. Root and the daemon's own user have no limit.
        images_per_uid_max: usize = 16,
        /// Memory of one user's started VMs. 0 means that only `mem_mib_max` applies.
        mem_mib_per_uid_max: u64 = 0,
        /// Memory of all started VMs. 0 means 80 percent of the host's memory.
        mem_mib_max: u64 = 0,
        /// vCPUs of one VM.
        vcpus_max: u32 = 32,
        /// Size of one disk in bytes.
        disk_bytes_max: u64 = 1 << 40,
        /// A transfer ends when no byte has moved for this long.
        transfer_idle_s: u64 = 60,
        /// A transfer that averages fewer bytes per second than this over `transfer_rate_window_s`
        /// is ended. 0 disables this.
        transfer_bytes_per_s_min: u64 = 1024,
        /// The window for `transfer_bytes_per_s_min`.
        transfer_rate_window_s: u64 = 180,
        /// How long a guest may take from the start of its VMM until its SSH server answers.
        boot_timeout_s: u64 = 120,
        /// How long a guest may take to shut down before it is forced.
        stop_timeout_s: u64 = 20,
        /// Size of one VM's console log, which is kept in two files of half this size.
        console_bytes_max: u64 = 4 << 20,
    }
}

impl Limits {
    /// Returns how many transfers of one user may run at the same time.
    pub fn running_per_uid_max(&self) -> usize {
        match self.pool_workers_per_uid_max {
            0 => (self.pool_workers * 3 / 4).max(1),
            set => set,
        }
    }

    /// Returns how many finished operations are kept.
    pub fn retention(&self) -> Retention {
        Retention {
            per_uid_max: self.operations_kept_per_uid,
            total_max: self.operations_kept_max,
        }
    }
}
