//! The life of the daemon's process: state directory and its lock, signals, draining and exit.

use super::claim;
use super::dispatch::Dispatch;
use super::{Limits, Server};
use crate::config::Config;
use crate::daemon::uninstall::LOCK_FILE;
use crate::daemon::{Daemon, Seams, Watchdog};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags};
use rustix::fs::{FlockOperation, OFlags};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// `EX_TEMPFAIL` (sysexits.h): another daemon holds the state directory.
pub(super) const EXIT_HELD: u8 = 75;
/// `EX_CONFIG`: the configuration or the database is rejected.
pub(super) const EXIT_REFUSED: u8 = 78;

/// How long transfers may continue after SIGTERM.
const TRANSFERS_GRACE: Duration = Duration::from_secs(10);
/// How long the daemon may take to exit after SIGTERM.
const EXIT_DEADLINE: Duration = Duration::from_secs(15);
/// How long callers may stay connected after all operations have ended.
const ANSWERS_GRACE: Duration = Duration::from_secs(1);
/// How long to wait for the lock of a daemon that has died.
const HELD_BY_NOBODY_GRACE: Duration = Duration::from_secs(5);
const HELD_BY_NOBODY_PERIOD: Duration = Duration::from_millis(20);
/// How many descriptors are needed in addition to those of connections, for consoles, monitors,
/// disks and the database.
const OPEN_FILES_RESERVE: u64 = 4096;

/// Returns the exit status for an error that ends the daemon.
pub fn exit_status(error: &Error) -> u8 {
    match error.kind() {
        Kind::Busy => EXIT_HELD,
        // After a conflict with something else on this host, only another configuration helps.
        Kind::InvalidConfig | Kind::StoreRefused | Kind::Conflict => EXIT_REFUSED,
        _ => 1,
    }
}

/// Serves until SIGTERM, SIGINT or SIGHUP. VMs keep running.
pub fn run(config: Config) -> Result<()> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    crate::host::limits::raise_open_files(
        config.limits.connections_max as u64 + OPEN_FILES_RESERVE,
    )?;
    let mut signals = watch_signals()?;
    require_reachable(&config)?;
    // VMMs have other uids and must reach their files below the state directory.
    drop(crate::host::fs::create_dir(&config.state_dir, 0o711)?);
    let _held = hold(&config.state_dir)?;
    let claim = claim_host(&config)?;
    let mut seams = Seams::real(&config)?;
    if let Some(claim) = &claim {
        seams.installations = Some(Arc::new(claim.registry()));
    }
    let daemon = Daemon::open(config.clone(), seams)?;
    #[cfg(feature = "fakes")]
    if let Some(plan) = crate::daemon::DieAt::from_env() {
        daemon.core.effects.follow(plan.clone());
        daemon.core.store.faults().ask(plan);
    }
    let dispatch = Arc::new(Dispatch::new(daemon.clone()));
    let server = Server::bind(&config.socket, Limits::from(&config.limits), dispatch)?;
    let reconciling = daemon.clone();
    let reconciled = crate::host::thread::spawn("reconcile", move || {
        reconciling.reconciler.reconcile();
        reconciling.images.delete_temporary_images();
        reconciling.warm_up();
        crate::host::memory::give_back();
        reconciling.reconciler.run_sweeper();
    })?;
    let uninstalling = daemon.core.uninstalling.clone();
    crate::host::thread::spawn("uninstall", move || exit_when_uninstalled(&uninstalling))?;
    let space_monitor = daemon.space_monitor.clone();
    let watchdog = Watchdog::new(&daemon.core);
    let watched = crate::host::thread::spawn("watchdog", move || watchdog.run())?;
    let roomed = crate::host::thread::spawn("room", move || space_monitor.run())?;
    tell_systemd(NotifyState::Ready);
    log::info!(
        "fcd {} serves {} from {}",
        env!("CARGO_PKG_VERSION"),
        config.socket.display(),
        config.state_dir.display()
    );

    let first = signals.forever().next().unwrap_or(SIGTERM);
    tell_systemd(NotifyState::Stopping);
    log::info!(
        "{}: draining",
        signal_hook::low_level::signal_name(first).unwrap_or("signal")
    );
    crate::host::thread::spawn("second-signal", move || {
        // A closing terminal sends SIGHUP, and so does its shell. So SIGHUP never cuts the drain
        // short, and after a SIGHUP it takes two other signals to do so.
        let mut left = if first == SIGHUP { 2 } else { 1 };
        for signal in signals.forever() {
            left -= i32::from(signal != SIGHUP);
            if left > 0 {
                continue;
            }
            crate::host::log::say("fcd: second signal: exiting at once");
            std::process::exit(1);
        }
    })?;
    let begun = Instant::now();
    drain(
        &server,
        &daemon,
        begun + TRANSFERS_GRACE,
        begun + EXIT_DEADLINE,
    );
    drop((reconciled, roomed, watched));
    if daemon.uninstaller.is_asked_for() {
        // Remove the socket first, because its directory is removed with the rest.
        drop(server);
        daemon.uninstaller.remove()?;
        claim.map_or(Ok(()), claim::Held::forget)?;
        log::info!("done; this installation has been removed");
        return Ok(());
    }
    log::info!("done; VMs keep running");
    Ok(())
}

/// Ends the daemon as SIGTERM does, once a caller has asked for its removal.
fn exit_when_uninstalled(uninstalling: &Cancel) {
    let mut asked = [PollFd::new(uninstalling.fd(), PollFlags::POLLIN)];
    if let Err(e) = crate::host::wait::poll_until(&mut asked, None) {
        log::error!("wait for an uninstallation: {e}");
        return;
    }
    if let Err(e) = nix::sys::signal::raise(nix::sys::signal::SIGTERM) {
        log::error!("exit to uninstall: {e}");
    }
}

/// Fails if VMMs cannot reach the state directory. Call this before anything is made there.
/// Otherwise, the problem would show only when the first VM starts.
fn require_reachable(config: &Config) -> Result<()> {
    let closed = crate::daemon::state_dir_check(&config.state_dir, config.vmm.driver);
    closed.map_or(Ok(()), |check| {
        Err(Error::new(Kind::InvalidConfig, check.found).hint(check.fix.unwrap_or_default()))
    })
}

/// Claims uids and a subnet of the host if this process is root. A user's daemon does not give VMs
/// uids or subnets.
fn claim_host(config: &Config) -> Result<Option<claim::Held>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let take = |dir: &Path| claim::take(&config.state_dir, &config.qemu, &config.network, dir);
    // Tests run many daemons at once, each with its own directory of claims.
    #[cfg(feature = "fakes")]
    if let Some(dir) = std::env::var_os("FCD_TEST_CLAIMS") {
        return take(Path::new(&dir)).map(Some);
    }
    take(Path::new(claim::DIR)).map(Some)
}

/// Sends a state to systemd, if it started this process (`Type=notify`).
fn tell_systemd(state: NotifyState<'_>) {
    if let Err(e) = sd_notify::notify(&[state]) {
        log::warn!("notify systemd: {e}");
    }
}

/// Watches for the signals that end the daemon. SIGHUP is one of them unless it is ignored, as
/// under `nohup`.
fn watch_signals() -> Result<Signals> {
    let mut ending = vec![SIGTERM, SIGINT];
    if !crate::host::inherited::ignores(SIGHUP)? {
        ending.push(SIGHUP);
    }
    Signals::new(ending).map_err(|e| Error::io("watch for signals", e))
}

/// Shuts down: stops accepting calls, waits until operations have ended and are answered, and then
/// closes all connections. Returns how many connections are left.
pub fn drain(
    server: &Server,
    daemon: &Daemon,
    transfers_until: Instant,
    deadline: Instant,
) -> usize {
    server.stop_accepting();
    daemon.close(transfers_until, deadline);
    // The callers of the operations that have just ended are getting their answers now.
    server.drain(deadline.min(Instant::now() + ANSWERS_GRACE));
    server.hang_up();
    server.drain(deadline)
}

/// Prints the daemon's checks as one JSON document, for `fcctl doctor` without a daemon.
pub fn print_doctor(config: &Config) -> Result<()> {
    let checks = crate::daemon::host_checks(config, &Seams::real(config)?)?;
    let text = serde_json::to_string_pretty(&crate::api::daemon::DoctorReply { checks })
        .map_err(|e| Error::internal("write the checks").with_source(e))?;
    println!("{text}");
    Ok(())
}

/// Locks the state directory, so that only one daemon uses it. The lock is an flock(2) on a file
/// that is never unlinked. The error names the process that holds the lock.
fn hold(state_dir: &Path) -> Result<File> {
    crate::locks::may_block("sleep");
    let path = state_dir.join(LOCK_FILE);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::open(&path, flags, rustix::fs::Mode::from_raw_mode(0o600))
        .map_err(|e| Error::io(format!("open {}", path.display()), e))?;
    let mut file = File::from(fd);
    let deadline = Instant::now() + HELD_BY_NOBODY_GRACE;
    while rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        let _ = file
            .rewind()
            .and_then(|()| (&file).take(32).read_to_string(&mut holder));
        // A daemon that was killed while starting a process leaves its lock to that process until
        // the process calls exec.
        let is_dead = holder
            .trim()
            .parse()
            .is_ok_and(|pid| crate::host::process::arguments(pid).is_empty());
        if !is_dead || Instant::now() > deadline {
            return Err(Error::new(
                Kind::Busy,
                format!(
                    "lock the state directory {}: another fcd holds it, process {}",
                    state_dir.display(),
                    holder.trim()
                ),
            )
            .hint("stop that process, or start this one with another --state-dir and --socket"));
        }
        std::thread::sleep(HELD_BY_NOBODY_PERIOD);
    }
    let write = |file: &mut File| {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())
    };
    write(&mut file).map_err(|e| Error::io(format!("write {}", path.display()), e))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Between fork and exec a child shares its parent's descriptors, and it may exec after the
    /// parent has died.
    #[test]
    fn lock_of_dead_daemon_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let held = hold(dir.path()).unwrap();
        // This is larger than any real pid (proc(5), pid_max).
        std::fs::write(dir.path().join(LOCK_FILE), "4194305\n").unwrap();
        let waits = std::thread::scope(|scope| {
            let next = scope.spawn(|| hold(dir.path()).map(drop));
            std::thread::park_timeout(HELD_BY_NOBODY_PERIOD * 5);
            drop(held);
            next.join().unwrap()
        });
        waits.unwrap();
    }

    #[test]
    fn second_daemon_reports_holder_of_state_dir() {
        let dir = tempfile::tempdir().unwrap();
        let held = hold(dir.path()).unwrap();
        let e = hold(dir.path()).unwrap_err();
        assert_eq!(exit_status(&e), EXIT_HELD);
        assert!(
            e.to_string()
                .ends_with(&format!("process {}", std::process::id())),
            "{e}"
        );
        drop(held);
        hold(dir.path()).unwrap();
    }

    #[test]
    fn lock_file_symlink_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let canary = dir.path().join("canary");
        std::os::unix::fs::symlink(&canary, dir.path().join(LOCK_FILE)).unwrap();
        assert!(hold(dir.path()).is_err());
        assert!(!canary.exists());
    }
}
