//! The system calls that a helper may make. Every other call fails with EPERM.
//!
//! A refused call does not kill the helper, because a library may try something optional, such as
//! reading a configuration file or the number of cores, and then continues without it. A helper
//! that a guest controls gains nothing by trying.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

/// The condition under which a call is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    Always,
    /// The argument with this index, counted from 0, is one of these values.
    ArgumentIn(u8, &'static [u64]),
    /// The argument with this index has none of these bits.
    ArgumentLacks(u8, u64),
    /// Those bits of the argument with this index that are in the mask have this value.
    ArgumentMasked(u8, u64, u64),
}
use Allowed::{Always, ArgumentIn, ArgumentLacks, ArgumentMasked};

/// One system call (`libc::SYS_*`).
#[derive(Clone, Copy, Debug)]
pub struct Call(pub libc::c_long, pub Allowed);

/// Allows a call only if it does not make memory executable.
const NO_EXEC: Allowed = ArgumentLacks(2, libc::PROT_EXEC as u64);
/// Allows fcntl(2) only with these commands. `F_SETOWN` is not among them, because it sends signals
/// to other processes.
const FCNTL: Allowed = ArgumentIn(
    1,
    &[
        libc::F_GETFD as u64,
        libc::F_SETFD as u64,
        libc::F_GETFL as u64,
        libc::F_SETFL as u64,
        libc::F_DUPFD_CLOEXEC as u64,
    ],
);

/// Allows a call only if its address is null, so that a helper sends only to the peers that its
/// sockets are connected to. sendmsg(2) is not allowed at all, because it could name another
/// address or pass descriptors.
const TO_ITS_PEER: Allowed = ArgumentIn(4, &[0]);

/// The calls that every helper needs: memory, time, randomness, waiting, and the use of its
/// descriptors. None of them opens a file or creates a socket.
pub(super) const BASE: &[Call] = &[
    Call(libc::SYS_read, Always),
    Call(libc::SYS_readv, Always),
    Call(libc::SYS_write, Always),
    Call(libc::SYS_writev, Always),
    Call(libc::SYS_close, Always),
    Call(libc::SYS_recvfrom, Always),
    Call(libc::SYS_recvmsg, Always),
    Call(libc::SYS_sendto, TO_ITS_PEER),
    Call(libc::SYS_shutdown, Always),
    #[cfg(target_arch = "x86_64")]
    Call(libc::SYS_poll, Always),
    Call(libc::SYS_ppoll, Always),
    Call(libc::SYS_fcntl, FCNTL),
    Call(
        libc::SYS_ioctl,
        ArgumentIn(1, &[libc::FIONBIO, libc::FIONREAD]),
    ),
    Call(libc::SYS_brk, Always),
    Call(libc::SYS_mmap, NO_EXEC),
    Call(libc::SYS_mprotect, NO_EXEC),
    Call(libc::SYS_mremap, Always),
    Call(libc::SYS_munmap, Always),
    Call(libc::SYS_madvise, Always),
    Call(libc::SYS_futex, Always),
    Call(libc::SYS_getrandom, Always),
    Call(libc::SYS_clock_gettime, Always),
    Call(libc::SYS_clock_nanosleep, Always),
    Call(libc::SYS_nanosleep, Always),
    Call(libc::SYS_restart_syscall, Always),
    Call(libc::SYS_rt_sigaction, Always),
    Call(libc::SYS_rt_sigprocmask, Always),
    Call(libc::SYS_rt_sigreturn, Always),
    Call(libc::SYS_sigaltstack, Always),
    Call(libc::SYS_sched_yield, Always),
    Call(libc::SYS_getpid, Always),
    Call(libc::SYS_gettid, Always),
    Call(libc::SYS_exit, Always),
    Call(libc::SYS_exit_group, Always),
];

/// The calls that a helper with threads needs in addition.
pub(super) const THREADS: &[Call] = &[
    Call(libc::SYS_clone, ArgumentMasked(0, CLONE_MASK, CLONE_THREAD)),
    // Another filter makes this call fail with ENOSYS.
    Call(libc::SYS_clone3, Always),
    Call(libc::SYS_set_robust_list, Always),
    Call(libc::SYS_rseq, Always),
    Call(libc::SYS_sched_getaffinity, Always),
    Call(libc::SYS_prctl, ArgumentIn(0, &[libc::PR_SET_NAME as u64])),
];

/// The flags of clone(2) that start a thread of the process. A child process would be a process
/// that neither [`super::Helper`] nor the parent-death signal ends.
const CLONE_THREAD: u64 = (libc::CLONE_THREAD | libc::CLONE_VM) as u64;
/// The flags that are compared: those of a thread, and those that make namespaces.
const CLONE_MASK: u64 = CLONE_THREAD
    | (libc::CLONE_NEWUSER
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWCGROUP) as u64;

impl Call {
    fn rules(self) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        let one = |condition| SeccompRule::new(vec![condition]);
        let masked = |index, mask, value| {
            let equal = SeccompCmpOp::MaskedEq(mask);
            let condition = SeccompCondition::new(index, SeccompCmpArgLen::Qword, equal, value);
            Ok(vec![condition.and_then(one)?])
        };
        match self.1 {
            Always => Ok(Vec::new()),
            ArgumentIn(index, values) => values
                .iter()
                .map(|value| {
                    SeccompCondition::new(index, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, *value)
                        .and_then(one)
                })
                .collect(),
            ArgumentLacks(index, bits) => masked(index, bits, 0),
            ArgumentMasked(index, mask, value) => masked(index, mask, value),
        }
    }
}

/// Returns a filter that makes clone3(2) fail with ENOSYS, so that the C library starts threads
/// with clone(2) instead. A filter cannot check the flags of clone3, which are behind a pointer.
pub(super) fn without_clone3() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let missing = SeccompAction::Errno(libc::ENOSYS as u32);
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, SeccompAction::Allow, missing, arch)?.try_into()
}

/// Returns the filter that allows only these calls.
pub(super) fn compile(
    calls: impl Iterator<Item = Call>,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules = BTreeMap::new();
    for call in calls {
        #[allow(clippy::useless_conversion)] // `c_long` has 32 bits elsewhere.
        rules.insert(i64::from(call.0), call.rules()?);
    }
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, refuse, SeccompAction::Allow, arch)?.try_into()
}
