//! Scripts that the daemon runs in guests, and the paths that they use there.

use crate::host::time::now_s;
use crate::image::SHUTDOWN_COMMAND;
use crate::store::VmRow;
use std::time::Duration;

/// How long a guest may take to power off without its init (`src/image/runtime/guest/image-off`).
const FORCED_POWER_OFF: Duration = Duration::from_secs(15);

/// Prints the local addresses of listening sockets, whose state is 0A (proc(5)), with sed.
const LISTENING: &str = r"s/^ *[0-9]*: \([0-9A-F]*:[0-9A-F]*\) [0-9A-F:]* 0A .*/\1/p";

/// The kinds of guests, by the origin of their init.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// The image contains fcd's init and the distribution's programs.
    Own,
    /// The guest runtime provides fcd's init and all programs. The image need not contain any.
    Runtime,
}

impl Layout {
    pub(super) fn of(row: &VmRow) -> Self {
        match row.shape.runtime {
            Some(_) => Self::Runtime,
            None => Self::Own,
        }
    }

    /// Returns the user that runs the daemon's own scripts. In a guest with a runtime, this user's
    /// shell finds only the runtime's programs; every other user's shell is the image's.
    pub(super) fn script_user(self) -> &'static str {
        match self {
            Self::Own => "root",
            Self::Runtime => "fcd",
        }
    }

    fn busybox(self) -> &'static str {
        match self {
            Self::Own => "/usr/lib/fcd/busybox",
            Self::Runtime => "/.fcd/bin/busybox",
        }
    }

    /// Returns the directory for files that do not outlive a boot.
    fn run_dir(self) -> &'static str {
        match self {
            Self::Own => "/run/fcd",
            Self::Runtime => "/.fcd/run",
        }
    }

    /// Returns a directory in which every user of the guest may create files.
    pub(super) fn shared_dir(self) -> &'static str {
        match self {
            Self::Own => "/tmp",
            // An image may have no /tmp.
            Self::Runtime => "/dev/shm",
        }
    }

    /// Returns the command for a clean shutdown; see [`SHUTDOWN_COMMAND`]. If the image's own init
    /// has not powered off after most of `limit`, the guest is powered off without it.
    pub(super) fn shutdown_command(self, limit: Duration) -> String {
        match self {
            Self::Own => SHUTDOWN_COMMAND.to_owned(),
            Self::Runtime => {
                let allowed = limit - FORCED_POWER_OFF.min(limit / 2);
                format!("/.fcd/lib/shutdown {}", allowed.as_secs().max(1))
            }
        }
    }

    /// Returns the command that runs a script from standard input. With `sh -s`, background
    /// processes would keep a descriptor of the script open, and with it the connection.
    pub(super) fn script_command(self) -> String {
        format!("{} sh -c \"$(cat)\"", self.busybox())
    }

    /// Returns the script that a guest runs while it is saved in a snapshot.
    pub(super) fn rejoin_script(self) -> String {
        let variables = format!("bb={}\nrun={}\n", self.busybox(), self.run_dir());
        variables + crate::guest::REJOIN
    }

    /// Returns the command that waits until the guest has applied the seed with this token.
    pub(super) fn wait_rejoined_command(self, token: &str) -> String {
        let (busybox, run) = (self.busybox(), self.run_dir());
        format!(
            "until read -r seen <{run}/rejoined && [ \"$seen\" = {token} ]; do {busybox} usleep 50000; done 2>/dev/null"
        )
    }

    /// Returns the command that waits until the list of listening TCP sockets differs from standard
    /// input, at most `limit`, and prints the list. A line is a local address as the kernel writes
    /// it.
    pub(super) fn listeners_command(self, limit: Duration) -> String {
        let (busybox, seconds) = (self.busybox(), limit.as_secs());
        format!(
            "seen=$({busybox} cat); n=0; \
             while now=$({busybox} sed -n '{LISTENING}' /proc/net/tcp /proc/net/tcp6 2>/dev/null); \
             [ \"$now\" = \"$seen\" ] && [ $n -lt {seconds} ]; \
             do {busybox} sleep 1; n=$((n+1)); done; printf '%s\\n' \"$now\""
        )
    }

    /// Returns the command that sets the guest's clock to the host's current time.
    pub(super) fn set_clock_command(self) -> String {
        format!("{} date -s @{} >/dev/null", self.busybox(), now_s())
    }
}
