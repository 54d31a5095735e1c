//! Opens the database file. It is created once, checked whenever it is opened, and migrated step by
//! step. It is never silently replaced.

use super::sql::refused;
use super::{key, ledger, meta, op, snapshot, vfs, vm, workspace};
use crate::error::{Error, Result};
use crate::host::text::printable;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior, params};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(super) const FILE_NAME: &str = "fcd.db";
/// `PRAGMA application_id` of our files: `fcd1` (sqlite.org/pragma.html#pragma_application_id).
pub(super) const APPLICATION_ID: i32 = 0x6663_6431;
/// How long opening waits for another process's lock on the file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// After this many frames, the write-ahead log is folded into the database file and written from
/// its start again.
pub(super) const LOG_FRAMES: u32 = 250;
/// Length of the write-ahead log. The log is extended to this length in advance, and cut back to it
/// after a large commit. It then has room for [`LOG_FRAMES`] pages of 4 KiB with their headers.
pub(super) const LOG_BYTES: u64 = 1 << 20;
/// How many prepared statements a connection keeps. This is more than the tables need.
const STATEMENTS_MAX: usize = 32;
/// The key in `store_info` for the version of fcd that last wrote the database. An older fcd that
/// refuses the database reports this version.
pub(super) const WRITER: &str = "fcd_version";
pub(super) const THIS_VERSION: &str = env!("CARGO_PKG_VERSION");
/// Number of hexadecimal digits in an install id.
pub const INSTALL_ID_LEN: usize = 8;

/// Returns the SQL of all migrations. The entry with index `i` migrates version `i` to `i + 1`. If
/// the shape of a row changes, add an entry. Never change an existing entry.
pub(super) fn migrations() -> Vec<String> {
    let info = "CREATE TABLE store_info (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;";
    let first = [
        info,
        vm::CREATE,
        workspace::CREATE,
        op::CREATE,
        ledger::CREATE,
        key::CREATE,
        meta::CREATE,
    ]
    .concat();
    let later = [
        vm::ADD_NETWORK,
        vm::ADD_UNRESPONSIVE,
        vm::ADD_CAPABILITIES,
        snapshot::CREATE,
        vm::ADD_RATES,
        vm::ADD_KERNEL,
        snapshot::ADD_VMM_VERSION,
        vm::ADD_RUNTIME,
        vm::ADD_IMAGE_DIGEST,
        vm::ADD_INIT,
        vm::ADD_LABELS,
        vm::ADD_RESTART,
        vm::ADD_HOST_NAME,
        vm::ADD_COMMANDS,
        vm::ADD_IPV6,
        vm::ADD_AUTO_PORTS,
    ];
    std::iter::once(first)
        .chain(later.map(str::to_owned))
        .collect()
}

/// Opens `dir/fcd.db`, and creates it if it does not exist.
///
/// # Errors
/// `store_refused` unless the file is a sound database of fcd, of this version or an older one. A
/// file that is refused is not changed.
pub(super) fn open(dir: &Path, migrations: &[String]) -> Result<Connection> {
    check_dir(dir)?;
    let path = dir.join(FILE_NAME);
    if !path_exists(&path)? {
        create(dir, &path, migrations)?;
    }
    check_file(&path)?;
    let wal_was_there = path_exists(&wal_path(&path))?;
    let mut c = connect(&path)?;
    check_contents(&c, &path, migrations.len())?;
    let open: String = info(&c, "open")
        .map_err(|e| refuse(&path, e))?
        .unwrap_or_default();
    if open == "1" && !wal_was_there {
        let text = format!(
            "open database {}: its write-ahead log {FILE_NAME}-wal is missing",
            path.display()
        );
        return Err(refused(text)
            .hint("the last changes were in it: restore it, or restore both files from a backup"));
    }
    migrate(&mut c, &path, migrations)?;
    Ok(c)
}

/// Opens an existing, checked file again after an I/O error.
pub(super) fn reopen(dir: &Path) -> Result<Connection> {
    let path = dir.join(FILE_NAME);
    check_file(&path)?;
    let c = connect(&path)?;
    check_contents(&c, &path, migrations().len())?;
    Ok(c)
}

/// A transaction that begins and commits with prepared statements, because parsing such a statement
/// takes longer than running it. Dropping the transaction rolls it back.
pub(super) struct Transaction<'c>(&'c Connection);

impl<'c> Transaction<'c> {
    pub(super) fn begin(c: &'c Connection) -> rusqlite::Result<Self> {
        c.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        Ok(Self(c))
    }

    pub(super) fn commit(self) -> rusqlite::Result<()> {
        self.0.prepare_cached("COMMIT")?.execute([]).map(drop)
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        // The connection is in autocommit mode after a commit, and after an error for which SQLite
        // has rolled back.
        if !self.0.is_autocommit()
            && let Err(e) = self.0.execute_batch("ROLLBACK")
        {
            log::warn!("store: roll back: {e}");
        }
    }
}

pub(super) fn info(c: &Connection, name: &str) -> rusqlite::Result<Option<String>> {
    use rusqlite::OptionalExtension;
    c.query_row(
        "SELECT value FROM store_info WHERE name = ?1",
        [name],
        |r| r.get(0),
    )
    .optional()
}

pub(super) fn set_info(c: &Connection, name: &str, value: &str) -> rusqlite::Result<()> {
    c.prepare_cached(
        "INSERT INTO store_info (name, value) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
    )?
    .execute(params![name, value])
    .map(drop)
}

/// Records that the database was closed cleanly, so that the next start accepts a missing log. Then
/// folds the log into the file.
pub(super) fn close(c: Connection) -> rusqlite::Result<()> {
    set_info(&c, "open", "0")?;
    c.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
    c.close().map_err(|(_, e)| e)
}

/// Extends the write-ahead log to [`LOG_BYTES`], so that commits overwrite blocks that the file
/// already has.
///
/// A commit that makes the file longer changes its size and its block map. Then fdatasync(2) also
/// has to commit the file system's journal, which doubles the time. fallocate(2) does not help,
/// because the first write to each reserved block changes the block map too. SQLite ignores the
/// zeros after the last frame of a log.
pub(super) fn extend_log(dir: &Path) -> std::io::Result<()> {
    crate::locks::may_block("file access");
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = std::fs::File::from(rustix::fs::open(
        wal_path(&dir.join(FILE_NAME)),
        flags,
        Mode::empty(),
    )?);
    let len = file.seek(std::io::SeekFrom::End(0))?;
    let zeros = vec![0; LOG_BYTES.saturating_sub(len) as usize];
    if zeros.is_empty() {
        return Ok(());
    }
    let written = file.write_all(&zeros).and_then(|()| file.sync_all());
    if written.is_err() {
        // The disk may be full, so release the space.
        let _ = file.set_len(len);
    }
    written
}

/// Copies the log's changes into the database file. The next commit writes the log from its start
/// again.
pub(super) fn fold_log(c: &Connection) -> rusqlite::Result<()> {
    c.prepare_cached("PRAGMA wal_checkpoint(PASSIVE)")?
        .query_row([], |_| Ok(()))
}

/// Builds the error for a database that cannot be used, with a hint.
pub(super) fn refuse(path: &Path, e: rusqlite::Error) -> Error {
    let shown = path.display();
    let hint = match e.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            format!("see which process has it open: fuser -v {shown}")
        }
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            format!(
                "the file was not changed: move it away together with {shown}-wal, or restore a backup"
            )
        }
        _ => "run fcctl doctor".to_owned(),
    };
    refused(format!("open database {shown}"))
        .hint(hint)
        .with_source(e)
}

fn wal_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

fn path_exists(path: &Path) -> Result<bool> {
    crate::locks::may_block("file access");
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(refused(format!("look for {}", path.display())).with_source(e)),
    }
}

/// Checks that only the owner can put files into the directory. Otherwise another user could
/// replace a file after it was checked.
fn check_dir(dir: &Path) -> Result<()> {
    crate::locks::may_block("file access");
    let shown = dir.display();
    let stat = rustix::fs::stat(dir)
        .map_err(|e| refused(format!("open state directory {shown}")).with_source(e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(refused(format!(
            "state directory {shown} is not a directory"
        )));
    }
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        let text = format!("state directory {shown} belongs to uid {}", stat.st_uid);
        return Err(refused(text).hint(format!(
            "chown {} {shown}, or use another --state-dir",
            rustix::process::geteuid().as_raw()
        )));
    }
    if stat.st_mode & 0o022 != 0 {
        let text = format!("state directory {shown} is writable by others");
        return Err(refused(text).hint(format!("chmod go-w {shown}")));
    }
    Ok(())
}

/// Checks that the file is a regular file of this user without other hard links, and corrects its
/// mode.
fn check_file(path: &Path) -> Result<()> {
    crate::locks::may_block("file access");
    let shown = path.display();
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| {
        let why = if e == rustix::io::Errno::LOOP {
            " (a symbolic link)"
        } else {
            ""
        };
        refused(format!("open database {shown}{why}"))
            .hint("run fcctl doctor")
            .with_source(e)
    })?;
    let stat = rustix::fs::fstat(&fd)
        .map_err(|e| refused(format!("inspect database {shown}")).with_source(e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_nlink != 1 {
        return Err(refused(format!(
            "database {shown} is not a regular file with one link"
        ))
        .hint(format!("stat {shown}")));
    }
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        return Err(
            refused(format!("database {shown} belongs to uid {}", stat.st_uid))
                .hint(format!("stat {shown}")),
        );
    }
    if stat.st_size == 0 {
        let hint = format!("fcd never leaves it empty: restore a backup, or move {shown} away");
        return Err(refused(format!("database {shown} is empty")).hint(hint));
    }
    if stat.st_mode & 0o077 != 0 {
        log::warn!("database {shown} was accessible to others; its mode is now 0600");
        rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(|e| {
            refused(format!("restrict the mode of database {shown}")).with_source(e)
        })?;
    }
    Ok(())
}

fn connect(path: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let set_up = || -> rusqlite::Result<Connection> {
        vfs::register();
        let c = Connection::open_with_flags_and_vfs(path, flags, vfs::NAME)?;
        c.busy_timeout(BUSY_TIMEOUT)?;
        c.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
        // No other process writes while the daemon runs, so memory is authoritative.
        c.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        c.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
        c.pragma_update(None, "synchronous", "FULL")?;
        c.pragma_update_and_check(None, "journal_size_limit", LOG_BYTES as i64, |_| Ok(()))?;
        // The writer folds the log itself after it has answered its callers: see `fold_log`.
        c.pragma_update_and_check(None, "wal_autocheckpoint", 0, |_| Ok(()))?;
        c.pragma_update(None, "trusted_schema", "OFF")?;
        // Only a clean close folds the log into the file and removes it: see `close`.
        c.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        c.pragma_update(None, "cell_size_check", "ON")?;
        Ok(c)
    };
    set_up().map_err(|e| refuse(path, e))
}

fn check_contents(c: &Connection, path: &Path, newest: usize) -> Result<()> {
    let shown = path.display();
    let number = |name: &str| {
        c.pragma_query_value(None, name, |r| r.get::<_, i64>(0))
            .map_err(|e| refuse(path, e))
    };
    if number("application_id")? != i64::from(APPLICATION_ID) {
        let hint =
            format!("the file was not changed: move {shown} away, or use another --state-dir");
        return Err(refused(format!("database {shown} was not made by fcd")).hint(hint));
    }
    let version = number("user_version")?;
    if version > newest as i64 {
        return Err(newer(c, path, version));
    }
    if version < 1 {
        let hint = format!("restore a backup (ls {shown}.v*.bak), or use another --state-dir");
        let text = format!("database {shown} has the unknown schema {version}");
        return Err(refused(text).hint(hint));
    }
    let verdict: String = c
        .query_row("PRAGMA quick_check(1)", [], |r| r.get(0))
        .map_err(|e| refuse(path, e))?;
    if verdict != "ok" {
        let hint = format!("the file was not changed: restore a backup (ls {shown}.v*.bak)");
        return Err(refused(format!("database {shown} is damaged: {verdict}")).hint(hint));
    }
    if c.is_readonly("main").map_err(|e| refuse(path, e))? {
        return Err(refused(format!("database {shown} cannot be written"))
            .hint(format!("stat {shown}; findmnt -T {shown}")));
    }
    Ok(())
}

/// Builds the error for a database that a newer fcd wrote.
fn newer(c: &Connection, path: &Path, schema: i64) -> Error {
    let writer = info(c, WRITER).ok().flatten();
    let writer = writer.map(|version| printable(&version));
    let text = format!(
        "database {} was written by {} (schema {schema}); this is fcd {THIS_VERSION}",
        path.display(),
        match &writer {
            Some(version) => format!("fcd {version}"),
            None => "a newer fcd".to_owned(),
        }
    );
    let install = match &writer {
        Some(version) => format!("install fcd {version} or newer"),
        None => "install that fcd again".to_owned(),
    };
    refused(text).hint(format!("{install}; a database cannot be downgraded"))
}

/// Creates the database. The file has another name until it is complete, so that `fcd.db` is either
/// complete or missing.
fn create(dir: &Path, path: &Path, migrations: &[String]) -> Result<()> {
    crate::locks::may_block("file access");
    if path_exists(&wal_path(path))? {
        let text = format!(
            "database {} is missing, but its write-ahead log exists",
            path.display()
        );
        return Err(refused(text).hint(format!(
            "restore the database; to start without it, move {FILE_NAME}-wal away"
        )));
    }
    let fresh = dir.join("fcd.db.new");
    for suffix in ["", "-wal", "-shm", "-journal"] {
        let _ = std::fs::remove_file(dir.join(format!("fcd.db.new{suffix}")));
    }
    let doing = || format!("create database {}", path.display());
    make_file(&fresh).map_err(|e| Error::io(doing(), e))?;
    let fill = || -> rusqlite::Result<()> {
        let mut c = Connection::open_with_flags(&fresh, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        c.pragma_update(None, "synchronous", "FULL")?;
        let tx = c.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for sql in migrations {
            tx.execute_batch(sql)?;
        }
        set_info(&tx, "install_id", &random_install_id())?;
        set_info(&tx, WRITER, THIS_VERSION)?;
        tx.pragma_update(None, "application_id", APPLICATION_ID)?;
        tx.pragma_update(None, "user_version", migrations.len() as i64)?;
        tx.commit()?;
        c.close().map_err(|(_, e)| e)
    };
    fill().map_err(|e| match e.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => {
            Error::io(doing(), std::io::Error::from_raw_os_error(libc::ENOSPC))
        }
        _ => Error::new(crate::error::Kind::Host, doing()).with_source(e),
    })?;
    std::fs::rename(&fresh, path)
        .and_then(|()| sync_dir(dir))
        .map_err(|e| Error::io(doing(), e))
}

/// Creates a file with mode 0600. Fails if the name exists.
fn make_file(path: &Path) -> std::io::Result<()> {
    crate::locks::may_block("file access");
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::RUSR | Mode::WUSR)?;
    Ok(())
}

pub(super) fn sync_dir(dir: &Path) -> std::io::Result<()> {
    crate::locks::may_block("file access");
    std::fs::File::open(dir)?.sync_all()
}

fn random_install_id() -> String {
    // All digits of an ID are random, so the first eight will do.
    crate::ids::VmId::random().as_str()[..INSTALL_ID_LEN].to_owned()
}

fn migrate(c: &mut Connection, path: &Path, migrations: &[String]) -> Result<()> {
    let version: i64 = c
        .pragma_query_value(None, "user_version", |r| r.get(0))
        .map_err(|e| refuse(path, e))?;
    for (from, sql) in migrations.iter().enumerate().skip(version as usize) {
        back_up(c, path, from)?;
        let step = |c: &mut Connection| -> rusqlite::Result<()> {
            let tx = c.transaction_with_behavior(TransactionBehavior::Immediate)?;
            tx.execute_batch(sql)?;
            tx.pragma_update(None, "user_version", from as i64 + 1)?;
            set_info(&tx, WRITER, THIS_VERSION)?;
            tx.commit()
        };
        step(c).map_err(|e| {
            let text = format!(
                "migrate database {} from version {from} to {}",
                path.display(),
                from + 1
            );
            refused(text)
                .hint(format!(
                    "it was not changed: run the older fcd; a backup is in {}.v{from}.bak",
                    path.display()
                ))
                .with_source(e)
        })?;
        log::info!(
            "database {} now has version {}; the old one is in {FILE_NAME}.v{from}.bak",
            path.display(),
            from + 1
        );
    }
    Ok(())
}

/// Copies the database before a migration. The copy is either complete or missing.
fn back_up(c: &Connection, path: &Path, version: usize) -> Result<()> {
    crate::locks::may_block("file access");
    let copy = PathBuf::from(format!("{}.v{version}.bak", path.display()));
    let fresh = PathBuf::from(format!("{}.new", copy.display()));
    let doing = || format!("copy database {} before its migration", path.display());
    let _ = std::fs::remove_file(&fresh);
    make_file(&fresh).map_err(|e| Error::io(doing(), e))?;
    let copy_all = || -> rusqlite::Result<()> {
        let mut to = Connection::open_with_flags(&fresh, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        rusqlite::backup::Backup::new(c, &mut to)?.run_to_completion(256, Duration::ZERO, None)?;
        // In this mode the copy has no write-ahead log that could get lost.
        to.pragma_update_and_check(None, "journal_mode", "DELETE", |_| Ok(()))?;
        set_info(&to, "open", "0")?;
        to.close().map_err(|(_, e)| e)
    };
    copy_all().map_err(|e| {
        refused(doing())
            .hint("check the free space (df -h), then start fcd again")
            .with_source(e)
    })?;
    std::fs::rename(&fresh, &copy).map_err(|e| Error::io(doing(), e))?;
    path.parent()
        .map_or(Ok(()), sync_dir)
        .map_err(|e| Error::io(doing(), e))
}
