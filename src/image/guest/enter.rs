//! The login shell of guests that boot with the runtime. It is a static program that build.rs
//! compiles.
//!
//! sshd runs in a mount namespace of its own. This program enters the namespace of PID 1, where the
//! image's files are, sets the image's user, directory and environment, and becomes the image's
//! shell, or the runtime's if the image has none. Called as `enter-own`, it becomes the runtime's
//! shell with the runtime's programs only; the daemon's own scripts run like that. Called as
//! `enter-reseed`, it makes the kernel use the random numbers that were written to it.

#[path = "enter/accounts.rs"]
mod accounts;
#[path = "enter/settings.rs"]
mod settings;

use accounts::Account;
use settings::Settings;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

const NAMESPACE: &str = "/proc/1/ns/mnt";
const SETTINGS: &str = "/.fcd/run/seed/image";
const BIN: &str = "/.fcd/bin";
const GIT: &str = "/.fcd/lib/git-core";
const OWN_SHELL: &str = "/.fcd/bin/sh";
const IMAGE_SHELL: &str = "/bin/sh";
const SFTP_SERVER: &str = "/.fcd/lib/openssh/sftp-server";
/// The descriptor that the libc of sftp-server opens instead of /etc/passwd (see bundle.sh).
const USERS_FD: i32 = 100;
/// The variable with which `fcctl ssh` chooses another user than the image's.
const USER_VARIABLE: &str = "FCD_USER";
/// The size limit for reading a file of the image, because the image determines its size.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// The exit status if the command cannot be started as the image's settings require.
const FAILED: i32 = 125;
const CLONE_NEWNS: i32 = 0x0002_0000;
const RNDRESEEDCRNG: u64 = 0x5207;
const O_NONBLOCK: i32 = 0o4000;

unsafe extern "C" {
    fn setns(fd: i32, kind: i32) -> i32;
    fn ioctl(fd: i32, request: u64, ...) -> i32;
    fn setgroups(count: usize, groups: *const u32) -> i32;
    fn setgid(gid: u32) -> i32;
    fn setuid(uid: u32) -> i32;
    fn memfd_create(name: *const std::ffi::c_char, flags: u32) -> i32;
    fn dup2(old: i32, new: i32) -> i32;
    fn fchown(fd: i32, uid: u32, gid: u32) -> i32;
}

fn main() {
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_default();
    let args: Vec<OsString> = args.collect();
    if name.as_bytes().ends_with(b"enter-reseed") {
        std::process::exit(i32::from(!reseed()));
    }
    let own = name.as_bytes().ends_with(b"enter-own");
    // sshd marks a login shell with a dash.
    let is_login = name.as_bytes().starts_with(b"-");
    let ended = enter_namespace().and_then(|()| {
        if own {
            run_own(&args)
        } else {
            run_image(&args, is_login)
        }
    });
    let Err(why) = ended;
    eprintln!("fcd: {why}");
    std::process::exit(FAILED);
}

/// Makes the kernel use new random numbers at once (random(4)), in a guest that was restored.
fn reseed() -> bool {
    let opened = File::options().write(true).open("/dev/urandom");
    // SAFETY: the descriptor is open, and the request takes no argument.
    opened.is_ok_and(|file| unsafe { ioctl(file.as_raw_fd(), RNDRESEEDCRNG) } == 0)
}

/// This type has no values: a function that returns it only returns an error.
enum Never {}

fn enter_namespace() -> Result<(), String> {
    let file = File::open(NAMESPACE).map_err(|e| format!("open {NAMESPACE}: {e}"))?;
    // SAFETY: the descriptor is open, and this process has one thread.
    check("enter the image", unsafe {
        setns(file.as_raw_fd(), CLONE_NEWNS)
    })
}

/// Becomes the runtime's shell for a script of the daemon.
fn run_own(args: &[OsString]) -> Result<Never, String> {
    let mut command = Command::new(OWN_SHELL);
    command
        .args(args)
        .env_clear()
        .envs(kept_variables())
        .env("PATH", format!("{GIT}:{BIN}"))
        .env("GIT_EXEC_PATH", GIT)
        .env("GIT_TEMPLATE_DIR", "/.fcd/share/git-core/templates")
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .env("SHELL", OWN_SHELL)
        .env("TMPDIR", "/.fcd/run/tmp");
    Err(format!("run {OWN_SHELL}: {}", command.exec()))
}

/// Becomes the image's shell, or a command of the image.
fn run_image(args: &[OsString], is_login: bool) -> Result<Never, String> {
    let settings = settings::parse(&read(SETTINGS));
    let mut args = args.to_vec();
    let mut wanted = std::env::var(USER_VARIABLE).unwrap_or_default();
    if let [flag, line] = args.as_mut_slice()
        && flag == "-c"
    {
        let split = settings::split_line(line.as_bytes());
        let (user, command) = (split.user, split.command.to_vec());
        wanted = user.unwrap_or(wanted);
        *line = OsString::from_vec(command);
    }
    let args = args.as_slice();
    let wanted = if wanted.is_empty() {
        &settings.user
    } else {
        &wanted
    };
    let passwd = String::from_utf8_lossy(&read("/etc/passwd")).into_owned();
    let group = String::from_utf8_lossy(&read("/etc/group")).into_owned();
    let account = accounts::resolve(wanted, &passwd, &group)?;
    enter_directory(&settings)?;
    become_user(&account)?;

    let is_sftp = matches!(args, [flag, line] if flag == "-c" && line == SFTP_SERVER);
    if is_sftp {
        pass_users(&account, &passwd)?;
        let why = image_command(SFTP_SERVER, &settings, &account, "/bin/sh").exec();
        return Err(format!("run {SFTP_SERVER}: {why}"));
    }
    let login_shell = Some(account.shell.as_str()).filter(|shell| is_usable_shell(shell));
    let shells = [login_shell, Some(IMAGE_SHELL), Some(OWN_SHELL)];
    let variable = shells
        .into_iter()
        .flatten()
        .find(|shell| std::path::Path::new(shell).exists())
        .unwrap_or(OWN_SHELL);
    let mut why = String::new();
    // Only an interactive login uses the shell of passwd(5), because commands are lines for sh.
    for shell in shells.into_iter().skip(usize::from(!is_login)).flatten() {
        let mut command = image_command(shell, &settings, &account, variable);
        if is_login {
            let base = shell.rsplit('/').next().unwrap_or(shell);
            command.arg0(format!("-{base}"));
        }
        why = format!("run {shell}: {}", command.args(args).exec());
    }
    Err(why)
}

fn is_usable_shell(shell: &str) -> bool {
    let name = shell.rsplit('/').next().unwrap_or_default();
    shell.starts_with('/') && !matches!(name, "nologin" | "false" | "true" | "sync")
}

fn image_command(program: &str, settings: &Settings, account: &Account, shell: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .envs(kept_variables())
        .env("HOME", &account.home)
        .env("USER", &account.name)
        .env("LOGNAME", &account.name)
        .env("SHELL", shell);
    let host_name = read("/proc/sys/kernel/hostname");
    command.env("HOSTNAME", OsStr::from_bytes(host_name.trim_ascii_end()));
    for variable in &settings.env {
        command.env(
            OsStr::from_bytes(&variable.name),
            OsStr::from_bytes(&variable.value),
        );
    }
    let path = OsString::from_vec(settings::search_path(settings, BIN));
    command.env("PATH", path);
    command
}

/// Returns the variables of sshd that a command keeps.
fn kept_variables() -> impl Iterator<Item = (OsString, OsString)> {
    std::env::vars_os().filter(|(name, _)| {
        let name = name.as_bytes();
        name == b"TERM" || name.starts_with(b"SSH_")
    })
}

/// Changes to the image's working directory, which is created if it does not exist.
fn enter_directory(settings: &Settings) -> Result<(), String> {
    let dir = if settings.working_dir.is_empty() {
        "/"
    } else {
        &settings.working_dir
    };
    std::env::set_current_dir("/")
        .and_then(|()| std::fs::create_dir_all(dir))
        .and_then(|()| std::env::set_current_dir(dir))
        .map_err(|e| format!("enter the image's directory {dir}: {e}"))
}

fn become_user(account: &Account) -> Result<(), String> {
    let streams: [(i32, bool); 3] = [
        (0, std::io::stdin().is_terminal()),
        (1, std::io::stdout().is_terminal()),
        (2, std::io::stderr().is_terminal()),
    ];
    for (fd, _) in streams.into_iter().filter(|(_, is_terminal)| *is_terminal) {
        // The terminal belongs to the user who logged in. A group of u32::MAX means no change.
        // SAFETY: the call takes no pointers.
        unsafe { fchown(fd, account.uid, u32::MAX) };
    }
    // SAFETY: the pointer and the length describe one vector.
    check("set the groups", unsafe {
        setgroups(account.groups.len(), account.groups.as_ptr())
    })?;
    // SAFETY: the calls take no pointers.
    check("set the group", unsafe { setgid(account.gid) })?;
    check("set the user", unsafe { setuid(account.uid) })
}

/// Opens [`USERS_FD`], from which sftp-server reads the users. The account comes first, because the
/// image may have no entry for it.
fn pass_users(account: &Account, passwd: &str) -> Result<(), String> {
    let entry = account.to_passwd();
    // SAFETY: the name is a C string. The call returns a new descriptor or -1.
    let fd = unsafe { memfd_create(c"passwd".as_ptr(), 0) };
    // SAFETY: the call takes no pointers, and closes nothing that this program uses.
    if fd < 0 || unsafe { dup2(fd, USERS_FD) } < 0 {
        return Err(format!("pass the users: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is open and nothing else owns it.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(format!("{entry}\n{passwd}").as_bytes())
        .map_err(|e| format!("pass the users: {e}"))
}

fn check(doing: &str, returned: i32) -> Result<(), String> {
    if returned == 0 {
        return Ok(());
    }
    Err(format!("{doing}: {}", std::io::Error::last_os_error()))
}

/// Reads a regular file up to a limit. Anything else counts as empty, because the image may have a
/// FIFO or a device in its place.
fn read(path: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let opened = File::options()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(path);
    if let Ok(file) = opened
        && file.metadata().is_ok_and(|m| m.is_file())
        && file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).is_err()
    {
        bytes.clear();
    }
    bytes
}
