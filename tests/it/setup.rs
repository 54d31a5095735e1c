//! Runs `scripts/setup` with a real apt and dpkg on an archive and a file system of the test, and
//! checks what the script installs, refuses and prints. PATH contains links to the host's programs.
//! The archive's programs appear when their packages are installed.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const SETUP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/setup");
/// Programs that the script itself runs.
const TOOLS: &[&str] = &[
    "apt-cache",
    "apt-get",
    "awk",
    "bash",
    "cut",
    "dirname",
    "dpkg",
    "env",
    "head",
    "sed",
    "sort",
    "wc",
];
/// Programs that the script looks for, except QEMU from the archive.
const PRESENT: &[&str] = &[
    "cc",
    "git",
    "lz4",
    "make",
    "mkfs.ext4",
    "mmdebstrap",
    "perl",
    "pkg-config",
    "setpriv",
    "ssh",
    "unshare",
    "zstd",
];
const OLD: &str = "1:7.2-1";
const NEW: &str = "1:10.0-1~bpo1";

struct Lab(tempfile::TempDir);

impl Lab {
    /// Creates an archive with an old QEMU and an empty system. The suite `bpo` has the newer
    /// version.
    fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "dpkg installs only as root: run the tests as root"
        );
        let lab = Self(tempfile::tempdir().unwrap());
        for dir in [
            "bin",
            "home",
            "root/usr/bin",
            "root/var/lib/dpkg/info",
            "root/var/lib/dpkg/updates",
            "etc",
            "log",
            "pool",
        ] {
            fs::create_dir_all(lab.path(dir)).unwrap();
        }
        for dir in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(lab.path(dir)).unwrap();
        }
        for file in ["root/var/lib/dpkg/status", "root/var/lib/dpkg/available"] {
            fs::write(lab.path(file), "").unwrap();
        }
        for tool in TOOLS.iter().chain(PRESENT) {
            lab.link(tool);
        }
        lab.script("cargo", "echo cargo 1.999.0 '(of a test)'");
        lab.script("id", "echo 0");
        let at = lab.0.path().display();
        let conf = format!(
            "Dir::Etc \"{at}/etc\"; Dir::Etc::parts \"-\"; Dir::Etc::main \"-\"; Dir::Etc::sourceparts \"-\";
             Dir::State \"{at}/state\"; Dir::State::status \"{at}/root/var/lib/dpkg/status\";
             Dir::Cache \"{at}/cache\"; Dir::Log \"{at}/log\"; APT::Sandbox::User \"root\";
             DPkg::Options {{ \"--root={at}/root\"; }};\n"
        );
        fs::write(lab.path("apt.conf"), conf).unwrap();
        for (suite, version) in [("main", OLD), ("bpo", NEW)] {
            lab.add(suite, "qemu-system-common", version, "", &[]);
            let same = format!("Depends: qemu-system-common (= {version})\n");
            lab.add(
                suite,
                "qemu-system-x86",
                version,
                &same,
                &["qemu-system-x86_64"],
            );
        }
        lab.add("main", "qemu-utils", OLD, "", &["qemu-img"]);
        lab.add(
            "bpo",
            "qemu-utils",
            NEW,
            "Breaks: qemu-system-common (<< 1:8)\n",
            &["qemu-img"],
        );
        lab.offer(&["main", "bpo"]);
        lab
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(name)
    }

    fn link(&self, tool: &str) {
        let path = std::env::var_os("PATH").unwrap();
        let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
        let found = dirs
            .map(|dir: PathBuf| dir.join(tool))
            .find(|file| file.exists());
        symlink(
            found.unwrap_or_else(|| panic!("{tool} is not installed: run scripts/setup --test")),
            self.bin(tool),
        )
        .unwrap();
    }

    fn script(&self, name: &str, body: &str) {
        let _ = fs::remove_file(self.bin(name));
        fs::write(self.bin(name), format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(self.bin(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn bin(&self, name: &str) -> PathBuf {
        self.path("bin").join(name)
    }

    /// Adds a package with these programs to the archive's suite `suite`.
    fn add(&self, suite: &str, name: &str, version: &str, relations: &str, programs: &[&str]) {
        let tree = self.path(format!("tree/{suite}/{name}"));
        fs::create_dir_all(tree.join("DEBIAN")).unwrap();
        fs::create_dir_all(tree.join("usr/bin")).unwrap();
        for program in programs {
            fs::write(tree.join("usr/bin").join(program), "#!/bin/sh\n").unwrap();
            fs::set_permissions(
                tree.join("usr/bin").join(program),
                fs::Permissions::from_mode(0o755),
            )
            .unwrap();
        }
        // dpkg forgets a package without files, so each package gets one.
        let doc = tree.join("usr/share/doc").join(name);
        fs::create_dir_all(&doc).unwrap();
        fs::write(doc.join("copyright"), version).unwrap();
        let control = format!(
            "Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: t <t@t>\n{relations}Description: t\n"
        );
        fs::write(tree.join("DEBIAN/control"), &control).unwrap();
        let file = format!("pool/{suite}-{name}.deb");
        ok(Command::new("dpkg-deb")
            .args(["--root-owner-group", "-Znone", "-b"])
            .arg(&tree)
            .arg(self.path(&file)));
        let dir = self.path(format!("dists/{suite}/main/binary-{}", architecture()));
        fs::create_dir_all(&dir).unwrap();
        let stanza = format!(
            "{control}Filename: {file}\n{}\n",
            self.sums(&self.path(&file))
        );
        let packages = fs::read_to_string(dir.join("Packages")).unwrap_or_default();
        fs::write(dir.join("Packages"), packages + &stanza).unwrap();
    }

    fn sums(&self, file: &Path) -> String {
        let sum = ok(Command::new("sha256sum").arg(file));
        format!(
            "Size: {}\nSHA256: {}\n",
            fs::metadata(file).unwrap().len(),
            &sum[..64]
        )
    }

    /// Writes a sources.list with these suites and updates the package lists.
    fn offer(&self, suites: &[&str]) {
        let mut sources = String::new();
        for suite in suites {
            let index = format!("main/binary-{}/Packages", architecture());
            let packages = self.path(format!("dists/{suite}/{index}"));
            let (sum, size) = (
                ok(Command::new("sha256sum").arg(&packages)),
                fs::metadata(&packages).unwrap().len(),
            );
            let automatic = if *suite == "bpo" {
                "NotAutomatic: yes\nButAutomaticUpgrades: yes\n"
            } else {
                ""
            };
            let release = format!(
                "Suite: {suite}\nCodename: {suite}\nComponents: main\nArchitectures: {}\n{automatic}SHA256:\n {} {size} {index}\n",
                architecture(),
                &sum[..64]
            );
            fs::write(self.path(format!("dists/{suite}/Release")), release).unwrap();
            sources += &format!(
                "deb [trusted=yes] file:{} {suite} main\n",
                self.0.path().display()
            );
        }
        fs::write(self.path("etc/sources.list"), sources).unwrap();
        ok(self.command("apt-get").args(["-q", "update"]));
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let path = format!(
            "{}:{}",
            self.path("bin").display(),
            self.path("root/usr/bin").display()
        );
        command
            .env_clear()
            .env("PATH", path)
            .env("APT_CONFIG", self.path("apt.conf"))
            .env("HOME", self.path("home"));
        command
    }

    fn install(&self, packages: &[&str]) {
        ok(self
            .command("apt-get")
            .args(["-q", "-y", "install"])
            .args(packages));
    }

    /// Runs the script. Returns its exit status and its output.
    fn setup(&self, args: &[&str]) -> (Option<i32>, String) {
        let out = self.command(SETUP).args(args).output().unwrap();
        (out.status.code(), text(&out))
    }

    fn installed(&self) -> Vec<String> {
        let mut query = Command::new("dpkg-query");
        query.arg(format!(
            "--admindir={}",
            self.path("root/var/lib/dpkg").display()
        ));
        let all = ok(query.args(["-W", "-f", "${db:Status-Abbrev}${Package} ${Version}\n"]));
        all.lines()
            .filter_map(|line| line.strip_prefix("ii "))
            .map(str::to_owned)
            .collect()
    }
}

fn architecture() -> String {
    ok(Command::new("dpkg").arg("--print-architecture"))
        .trim()
        .to_owned()
}

fn text(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
}

#[track_caller]
fn ok(command: &mut Command) -> String {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", text(&out));
    String::from_utf8(out.stdout).unwrap()
}

/// QEMU's tools are installed in a version that the archive does not have.
#[test]
fn setup_downgrades_package_missing_from_archive() {
    let lab = Lab::new();
    lab.install(&[&format!("qemu-utils={NEW}")]);
    lab.offer(&["main"]);
    let (status, said) = lab.setup(&[]);
    assert_eq!(status, Some(0), "{said}");
    let expected =
        ["qemu-system-common", "qemu-system-x86", "qemu-utils"].map(|name| format!("{name} {OLD}"));
    assert_eq!(lab.installed(), expected);
    assert_eq!(
        lab.setup(&[]),
        (Some(0), String::new()),
        "nothing is left to do"
    );
}

#[test]
fn setup_keeps_newer_package_found_in_archive() {
    let lab = Lab::new();
    lab.install(&[&format!("qemu-utils={NEW}")]);
    let (status, said) = lab.setup(&[]);
    assert_eq!(status, Some(0), "{said}");
    let expected =
        ["qemu-system-common", "qemu-system-x86", "qemu-utils"].map(|name| format!("{name} {NEW}"));
    assert_eq!(lab.installed(), expected);
}

#[test]
fn setup_stops_if_another_package_would_be_removed() {
    let lab = Lab::new();
    lab.add("main", "precious", "3", "Conflicts: qemu-system-x86\n", &[]);
    lab.offer(&["main"]);
    lab.install(&["precious"]);
    let (status, said) = lab.setup(&[]);
    assert_eq!(status, Some(1), "{said}");
    assert!(
        said.contains("installing qemu-system-x86 qemu-utils would remove precious"),
        "{said}"
    );
    assert!(
        said.contains("hint: ") && said.contains("run scripts/setup again"),
        "{said}"
    );
    assert_eq!(lab.installed(), ["precious 3"]);
}

#[test]
fn setup_keeps_package_that_needs_newer_version() {
    let lab = Lab::new();
    lab.add(
        "main",
        "precious",
        "3",
        "Depends: qemu-utils (>= 1:9)\n",
        &[],
    );
    lab.offer(&["main", "bpo"]);
    lab.install(&["precious", &format!("qemu-utils={NEW}")]);
    lab.offer(&["main"]);
    let before = lab.installed();
    let (status, said) = lab.setup(&[]);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("precious"), "{said}");
    assert_eq!(lab.installed(), before);
}

#[test]
fn setup_held_package_is_not_changed() {
    let lab = Lab::new();
    lab.install(&[&format!("qemu-utils={NEW}")]);
    lab.offer(&["main"]);
    let set = format!(
        "echo qemu-utils hold | dpkg --root={} --set-selections",
        lab.path("root").display()
    );
    ok(Command::new("sh").args(["-c", &set]));
    let (status, said) = lab.setup(&[]);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("qemu-utils"), "{said}");
    let mut query = Command::new("dpkg-query");
    query.arg(format!(
        "--admindir={}",
        lab.path("root/var/lib/dpkg").display()
    ));
    assert_eq!(
        ok(query.args(["-W", "-f", "${Package} ${Version}\n"])),
        format!("qemu-utils {NEW}\n")
    );
}

/// The result depends on which programs exist afterwards, not on apt-get's exit status.
#[test]
fn setup_program_that_does_not_appear_is_an_error() {
    let lab = Lab::new();
    lab.script("apt-get", "exit 0");
    let (status, said) = lab.setup(&[]);
    assert_eq!(status, Some(1), "{said}");
    assert!(
        said.contains("qemu-system-x86 qemu-utils did not bring what is missing"),
        "{said}"
    );
}

#[test]
fn setup_without_package_lists_updates_them() {
    let lab = Lab::new();
    fs::remove_dir_all(lab.path("state/lists")).unwrap();
    let (status, said) = lab.setup(&[]);
    assert_eq!(status, Some(0), "{said}");
    assert_eq!(lab.installed().len(), 3);
}

#[test]
fn setup_by_an_ordinary_user_lists_everything_at_once() {
    let lab = Lab::new();
    lab.install(&[&format!("qemu-utils={NEW}")]);
    lab.offer(&["main"]);
    lab.script(
        "id",
        "case $1 in -u) echo 4000000000;; *) echo nobody-here;; esac",
    );
    for gone in ["cargo", "lz4"] {
        fs::remove_file(lab.bin(gone)).unwrap();
    }
    lab.add("main", "lz4", "1", "", &["lz4"]);
    lab.add("main", "uidmap", "1", "", &["newuidmap"]);
    lab.offer(&["main"]);
    let (status, said) = lab.setup(&["--check"]);
    assert_eq!(status, Some(1), "{said}");
    let all = [
        "qemu-system-x86_64 ",
        "lz4 ",
        "newuidmap ",
        "Rust 1.",
        "nobody-here in /etc/subuid",
        "in /etc/subgid",
    ];
    for thing in all {
        assert!(said.contains(thing), "{thing}: {said}");
    }
    // Without sudo the script prints the same list and the one command to run as root.
    let (status, said) = lab.setup(&[]);
    assert_eq!(status, Some(1), "{said}");
    for thing in all {
        assert!(said.contains(thing), "{thing}: {said}");
    }
    let command = format!(
        "apt-get install --no-install-recommends --allow-downgrades qemu-system-x86 lz4 uidmap qemu-utils={OLD}"
    );
    assert!(said.contains(&command), "{said}");
    assert_eq!(lab.installed(), [format!("qemu-utils {NEW}")]);
}

#[test]
fn setup_by_an_ordinary_user_without_package_lists_asks_for_them() {
    let lab = Lab::new();
    lab.script(
        "id",
        "case $1 in -u) echo 4000000000;; *) echo nobody-here;; esac",
    );
    fs::remove_dir_all(lab.path("state/lists")).unwrap();
    let (status, said) = lab.setup(&[]);
    assert_eq!(status, Some(1), "{said}");
    let hint = "hint: as root: apt-get update; then run scripts/setup again\n";
    assert!(said.ends_with(hint), "{said}");
}

#[test]
fn setup_with_everything_installed_runs_nothing() {
    let lab = Lab::new();
    lab.script("apt-get", "echo apt-get was run; exit 1");
    lab.script("qemu-img", "");
    lab.script("qemu-system-x86_64", "");
    assert_eq!(lab.setup(&[]), (Some(0), String::new()));
    assert_eq!(lab.setup(&["--check"]), (Some(0), String::new()));
    assert_eq!(lab.setup(&["--nonsense"]).0, Some(2));
}

#[test]
fn setup_leaves_old_rust_to_user() {
    let lab = Lab::new();
    lab.script("cargo", "echo cargo 1.63.0");
    let (status, said) = lab.setup(&[]);
    assert_eq!(status, Some(1), "{said}");
    assert!(
        said.contains("this is 1.63.0: rustup update stable"),
        "{said}"
    );
    assert_eq!(
        lab.installed().len(),
        3,
        "the script installed what it could"
    );
}
