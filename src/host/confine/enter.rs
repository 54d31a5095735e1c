//! The helper's side: reads the parent's request, and gives up the rights that the helper does not
//! need.

use super::ARGUMENT;
use super::filter::{self, BASE, Call, THREADS};
use crate::host::Credentials;
use seccompiler::{BackendError, BpfProgram};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The limits and rights of a helper.
#[derive(Clone, Copy, Debug)]
pub struct Profile {
    /// The limit of address space beyond what the program has when it starts.
    pub memory_bytes_max: u64,
    /// The limit of open files, including the three standard streams.
    pub open_files_max: u64,
    /// True if the helper may start threads.
    pub has_threads: bool,
    /// True if the helper may bind and connect TCP sockets. [`Profile::calls`] must then include
    /// the calls for sockets.
    pub has_network: bool,
    /// The files and directories that the helper may read. [`Profile::calls`] must then include the
    /// calls that open files. Paths that do not exist are skipped.
    pub readable: &'static [&'static str],
    /// The size limit of the files that the helper writes. It gets these files from its parent.
    pub file_bytes_max: u64,
    /// The system calls that the helper may make in addition to [`BASE`].
    pub calls: &'static [Call],
}

/// The parent's request to this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub name: String,
    owner: Option<Credentials>,
    parent: i32,
}

const OWN: &str = "-";

/// Returns the arguments of a helper, which [`Asked::parse`] reads back.
pub(super) fn arguments(name: &str, owner: Option<Credentials>) -> [OsString; 4] {
    let owner = owner.map_or(OWN.to_owned(), |o| format!("{}:{}", o.uid, o.gid));
    [
        ARGUMENT.into(),
        name.into(),
        owner.into(),
        std::process::id().to_string().into(),
    ]
}

/// Returns a closure that prefixes an error with the step that failed.
fn failed(doing: &str) -> impl FnOnce(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("{doing}: {e}"))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

impl Asked {
    /// Reads the request from this process's arguments. Returns None if this process is not a
    /// helper.
    pub fn from_args() -> Option<Self> {
        Self::parse(std::env::args_os().skip(1))
    }

    fn parse(args: impl Iterator<Item = OsString>) -> Option<Self> {
        let args: Vec<String> = args
            .take(5)
            .map(|a| a.to_string_lossy().into_owned())
            .collect();
        let [argument, name, owner, parent] = &args[..] else {
            return None;
        };
        if argument != ARGUMENT {
            return None;
        }
        let owner = match owner.split_once(':') {
            Some((uid, gid)) => Some(Credentials {
                uid: uid.parse().ok()?,
                gid: gid.parse().ok()?,
            }),
            None if owner == OWN => None,
            None => return None,
        };
        Some(Self {
            name: name.clone(),
            owner,
            parent: parent.parse().ok()?,
        })
    }

    /// Gives up every right that the profile does not grant. Call this method while the process has
    /// only one thread, and before it reads anything that a guest sent. Descriptor 0 is the
    /// channel.
    ///
    /// # Errors
    /// The error names the step that failed. The helper must then exit.
    #[allow(unsafe_code)]
    pub fn confine(&self, profile: &Profile) -> io::Result<()> {
        // SAFETY: the values that are passed outlive each call.
        unsafe {
            check(libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) as libc::c_int)
                .map_err(failed("close files"))?;
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
            libc::umask(0o777);
            // This call fails if the process already leads a session, which is just as good.
            libc::setsid();
            check(libc::chdir(c"/".as_ptr())).map_err(failed("leave the working directory"))?;
        }
        set_limits(profile).map_err(failed("limit resources"))?;
        if let Some(owner) = self.owner {
            become_owner(owner).map_err(failed("change to the VM's user"))?;
        }
        self.die_with_parent()
            .map_err(failed("set the parent-death signal"))?;
        // SAFETY: prctl gets only numbers.
        unsafe {
            check(libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0))
                .map_err(failed("make the process undumpable"))?;
            check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
                .map_err(failed("set no_new_privs"))?;
        }
        landlock(profile).map_err(failed("restrict file access with Landlock"))?;
        let threads = if profile.has_threads { THREADS } else { &[] };
        if profile.has_threads {
            install(filter::without_clone3())?;
        }
        install(filter::compile(
            [BASE, threads, profile.calls]
                .into_iter()
                .flatten()
                .copied(),
        ))
    }

    /// Asks the kernel to kill this process when its parent ends. A change of the uid clears this
    /// setting, so change the uid first.
    #[allow(unsafe_code)]
    fn die_with_parent(&self) -> io::Result<()> {
        // SAFETY: the call takes no pointers.
        unsafe {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
            // The parent may have died before the setting took effect.
            if libc::getppid() == self.parent {
                Ok(())
            } else {
                Err(io::Error::other("the parent has exited"))
            }
        }
    }
}

/// Installs a filter. The kernel obeys the strictest of all installed filters.
fn install(program: Result<BpfProgram, BackendError>) -> io::Result<()> {
    let program =
        program.map_err(|e| io::Error::other(format!("compile the system call filter: {e}")))?;
    seccompiler::apply_filter(&program)
        .map_err(|e| io::Error::other(format!("install the system call filter: {e}")))
}

#[allow(unsafe_code)]
fn set_limits(profile: &Profile) -> io::Result<()> {
    let used = address_space_bytes()?;
    let limits = [
        (libc::RLIMIT_CORE, 0),
        (libc::RLIMIT_FSIZE, profile.file_bytes_max),
        (
            libc::RLIMIT_AS,
            used.saturating_add(profile.memory_bytes_max),
        ),
        (libc::RLIMIT_NOFILE, profile.open_files_max),
    ];
    // The kernel counts processes and threads per uid, and a VMM may have threads under this uid.
    // So the limit is either 0 or not set.
    let no_threads = (!profile.has_threads).then_some((libc::RLIMIT_NPROC, 0));
    for (resource, most) in limits.into_iter().chain(no_threads) {
        let limit = libc::rlimit {
            rlim_cur: most,
            rlim_max: most,
        };
        // SAFETY: `limit` outlives the call.
        check(unsafe { libc::setrlimit(resource, &raw const limit) })?;
    }
    Ok(())
}

/// Reads the size of the address space, which is the first field of statm, in pages (proc(5)).
#[allow(unsafe_code)]
fn address_space_bytes() -> io::Result<u64> {
    crate::locks::may_block("file access");
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: Option<u64> = statm.split_whitespace().next().and_then(|n| n.parse().ok());
    let pages = pages.ok_or_else(|| io::Error::other("no size in /proc/self/statm"))?;
    // SAFETY: the call takes no pointers.
    let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    Ok(pages.saturating_mul(page_bytes.cast_unsigned() as u64))
}

#[allow(unsafe_code)]
fn become_owner(owner: Credentials) -> io::Result<()> {
    // SAFETY: the list of groups is empty; the other arguments are numbers.
    unsafe {
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setresgid(owner.gid, owner.gid, owner.gid))?;
        check(libc::setresuid(owner.uid, owner.uid, owner.uid))?;
        // A root process loses its capabilities when it changes to another uid. Verify that it
        // cannot become root again.
        if owner.uid != 0 && libc::setuid(0) == 0 {
            Err(io::Error::other("root can be regained"))
        } else {
            Ok(())
        }
    }
}

/// The kernel's `struct landlock_ruleset_attr` (linux/landlock.h).
#[repr(C)]
#[derive(Default)]
struct Ruleset {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

const LANDLOCK_CREATE_RULESET_VERSION: libc::c_uint = 1;
/// Returns the accesses that this version of the interface can deny (linux/landlock.h): the file
/// accesses up to `make_sym`, then `refer`, `truncate`, TCP, `ioctl_dev`, and the scopes.
const fn deniable(version: libc::c_long, has_network: bool) -> Ruleset {
    let fs_bits = match version {
        1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    Ruleset {
        handled_access_fs: (1 << fs_bits) - 1,
        handled_access_net: if version >= 4 && !has_network {
            0b11
        } else {
            0
        },
        scoped: if version >= 6 { 0b11 } else { 0 },
    }
}

/// The kernel's `struct landlock_path_beneath_attr` (linux/landlock.h).
#[repr(C, packed)]
struct PathBeneath {
    allowed_access: u64,
    parent_fd: libc::c_int,
}

const LANDLOCK_RULE_PATH_BENEATH: libc::c_int = 1;
const ACCESS_READ_FILE: u64 = 1 << 2;
const ACCESS_READ_DIR: u64 = 1 << 3;

/// Returns the version of the kernel's Landlock interface.
///
/// # Errors
/// `Unsupported` (`EOPNOTSUPP` or `ENOSYS`) if Landlock is disabled or not in the kernel.
#[allow(unsafe_code)]
pub fn landlock_version() -> io::Result<libc::c_long> {
    // SAFETY: without attributes, the call only returns the version of the interface.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<Ruleset>(),
            0,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    if version < 1 {
        return Err(io::Error::last_os_error());
    }
    Ok(version)
}

/// Denies every access that Landlock handles, except reading [`Profile::readable`]. Does nothing if
/// the kernel has no Landlock, because the system call filter and the modes of files still apply.
/// `doctor` reports that.
#[allow(unsafe_code)]
fn landlock(profile: &Profile) -> io::Result<()> {
    let Ok(version) = landlock_version() else {
        return Ok(());
    };
    let ruleset = deniable(version, profile.has_network);
    // Earlier versions know only the first members, and accept a larger structure if the other
    // members are 0.
    let size = std::mem::size_of::<Ruleset>();
    // SAFETY: the structure outlives the call, which returns a new descriptor.
    let rules = unsafe {
        let fd = libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const ruleset,
            size,
            0,
        );
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd as libc::c_int)
    };
    for path in profile.readable {
        allow_reading(&rules, path)?;
    }
    // SAFETY: the call takes no pointers.
    check(unsafe {
        libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) as libc::c_int
    })
}

#[allow(unsafe_code)]
fn allow_reading(rules: &OwnedFd, path: &str) -> io::Result<()> {
    crate::locks::may_block("file access");
    use rustix::fs::{FileType, Mode, OFlags};
    let opened = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let Ok(file) = opened else {
        return Ok(());
    };
    let is_dir = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) == FileType::Directory;
    let rule = PathBeneath {
        // A rule for a file must not name an access to directories.
        allowed_access: ACCESS_READ_FILE | if is_dir { ACCESS_READ_DIR } else { 0 },
        parent_fd: file.as_raw_fd(),
    };
    // SAFETY: the rule and both descriptors outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            rules.as_raw_fd(),
            LANDLOCK_RULE_PATH_BENEATH,
            &raw const rule,
            0,
        ) as libc::c_int
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read_back() {
        for owner in [
            None,
            Some(Credentials {
                uid: 1_900_000_001,
                gid: 1_900_000_002,
            }),
        ] {
            let asked = Asked::parse(arguments("guest", owner).into_iter()).unwrap();
            assert_eq!(
                (asked.name.as_str(), asked.owner, asked.parent),
                ("guest", owner, std::process::id() as i32)
            );
        }
        for bad in [
            "",
            "doctor",
            "helper",
            "helper guest",
            "helper guest 1 2",
            "helper guest - x",
            "helper guest - 1 2",
        ] {
            assert_eq!(
                Asked::parse(bad.split_whitespace().map(OsString::from)),
                None,
                "{bad}"
            );
        }
    }
}
