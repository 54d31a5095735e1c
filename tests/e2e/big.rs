//! Tests with trees that take a minute each under software emulation. The module's name makes them
//! start early, because they would run alone at the end.

use crate::host::Host;
use crate::tree::Site;
use std::fs;
use std::os::unix::fs::FileExt;

const MIB: u64 = 1 << 20;

/// The tree has 300 MiB in one file with holes.
#[test]
fn large_file_and_holes_are_copied_unchanged() {
    let host = Host::start();
    host.boot("box");
    let site = Site::unborn(&host, "box", "large");
    site.write("tracked", "x\n");
    site.commit("first");
    site.on_host(&format!("head -c {} /dev/urandom > big", 300 * MIB));
    let sparse = fs::File::create(site.path("sparse")).unwrap();
    for i in 0..20 {
        sparse.write_all_at(b"data", i * 1_000_000).unwrap();
    }
    sparse.set_len(24 * MIB).unwrap();
    fs::File::create(site.path("hole"))
        .unwrap()
        .set_len(16 * MIB)
        .unwrap();
    site.prepare();
    site.assert_same_tree();
    assert!(site.assert_same_status().contains("?? big\0"));
    for name in ["sparse", "hole"] {
        let on_disk: u64 = site
            .said_in_guest(&format!("echo $(($(stat -c %b {name}) * 512))"))
            .trim()
            .parse()
            .unwrap();
        assert!(on_disk < MIB, "{name} takes {on_disk} bytes in the guest");
    }
}

/// The tree has 20,000 small files, and git tracks some of them.
#[test]
fn many_files_are_copied_unchanged() {
    let host = Host::start();
    host.boot("box");
    let site = Site::unborn(&host, "box", "many");
    for i in 0..20_000 {
        site.write(format!("d{}/file {i}", i % 100), format!("number {i}\n"));
    }
    site.git(&["add", "d1", "d2", "d3"]);
    site.git(&["commit", "-qm", "some"]);
    site.write("d1/file 1", "changed\n");
    site.prepare();
    site.assert_same_tree();
    assert!(site.assert_same_status().contains(" M d1/file 1\0"));
}
