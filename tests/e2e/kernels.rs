//! Tests of VMs with a kernel other than the image's, as an ELF file and as a bzImage, with a
//! distribution's modules.

use crate::host::{Host, image, text};
use std::path::Path;
use std::process::{Command, Stdio};

/// Makes a bzImage: packs the kernel and prefixes it with the header of the boot protocol, as the
/// kernel's build does (Documentation/arch/x86/boot.rst).
fn bzimage(vmlinux: &Path, version: &str) -> Vec<u8> {
    const SECTOR: usize = 512;
    let packed = Command::new("gzip")
        .args(["-1", "-n", "-c"])
        .arg(vmlinux)
        .output()
        .unwrap()
        .stdout;
    let unpacked = u32::try_from(std::fs::metadata(vmlinux).unwrap().len()).unwrap();
    let mut bytes = vec![0; 2 * SECTOR];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0x1f1, &[1]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x20e, &0x100_u16.to_le_bytes());
    put(0x248, &0_u32.to_le_bytes());
    put(
        0x24c,
        &(u32::try_from(packed.len()).unwrap() + 4).to_le_bytes(),
    );
    put(
        0x300,
        format!("{version} (somebody@somewhere) #1 SMP").as_bytes(),
    );
    [bytes, packed, unpacked.to_le_bytes().to_vec()].concat()
}

#[track_caller]
fn refused(host: &Host, args: &[&str], kind: &str) {
    let out = host.fcctl(&[&["--json"], args].concat());
    let (_, stderr) = text(&out);
    assert!(
        !out.status.success() && stderr.contains(&format!("\"kind\":\"{kind}\"")),
        "{args:?}: {stderr}"
    );
}

#[test]
fn distribution_kernel_boots_beside_image_kernel() {
    let host = Host::start();
    host.boot("box");
    let version = host.sh("box", "uname -r").trim().to_owned();
    let dir = tempfile::tempdir().unwrap();
    let mut unpack = Command::new("tar")
        .arg("-x")
        .current_dir(&dir)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pack = host.command(&[
        "exec",
        "box",
        "--",
        "tar",
        "-C",
        "/",
        "-c",
        &format!("lib/modules/{version}"),
    ]);
    assert!(
        pack.stdout(unpack.stdin.take().unwrap())
            .status()
            .unwrap()
            .success()
    );
    drop(pack);
    assert!(unpack.wait().unwrap().success());
    let modules = dir
        .path()
        .join("lib/modules")
        .join(&version)
        .display()
        .to_string();
    let (vmlinux, vmlinuz) = (image().join("vmlinux"), dir.path().join("vmlinuz"));
    std::fs::write(&vmlinuz, bzimage(&vmlinux, &version)).unwrap();
    let (vmlinux, vmlinuz) = (vmlinux.to_str().unwrap(), vmlinuz.to_str().unwrap());

    host.ok(&["kernel", "import", vmlinuz, "--modules", &modules]);
    host.ok(&[
        "kernel",
        "import",
        vmlinux,
        "--modules",
        &modules,
        "--name",
        "plain",
    ]);
    let kernels = host.json(&["kernel", "list"]);
    let packed = kernels
        .as_array()
        .unwrap()
        .iter()
        .find(|k| k["name"] != "plain")
        .unwrap();
    assert_eq!(packed["version"], version.as_str());
    assert!(
        packed["modules"]
            .as_array()
            .unwrap()
            .iter()
            .any(|m| m == "virtio_blk.ko"),
        "{packed}"
    );
    let name = packed["name"].as_str().unwrap();
    assert_eq!(
        host.json(&["kernel", "show", "plain"])["modules"],
        packed["modules"]
    );
    refused(
        &host,
        &[
            "kernel",
            "import",
            vmlinux,
            "--modules",
            &modules,
            "--name",
            "plain",
        ],
        "name_taken",
    );
    refused(&host, &["kernel", "import", "/bin/sh"], "unsupported");
    refused(
        &host,
        &[
            "kernel",
            "import",
            vmlinux,
            "--modules",
            "/nowhere",
            "--name",
            "x",
        ],
        "path_not_found",
    );
    refused(&host, &["kernel", "show", "x"], "kernel_not_found");
    refused(
        &host,
        &["vm", "create", "--kernel", "x"],
        "kernel_not_found",
    );

    host.ok(&["vm", "create", "--name", "other", "--kernel", name]);
    host.ok(&["start", "other"]);
    assert_eq!(
        host.sh(
            "other",
            "uname -r; echo there >/root/mark; sync; cat /root/mark"
        ),
        format!("{version}\nthere\n")
    );
    assert_eq!(host.show("other", "kernel"), name);
    refused(&host, &["kernel", "delete", name], "conflict");
    host.ok(&["kernel", "delete", "plain"]);
    host.ok(&["rm", "-f", "other"]);
    host.ok(&["kernel", "delete", name]);
    assert_eq!(
        std::fs::read_dir(host.state().join("kernels"))
            .unwrap()
            .count(),
        0
    );
}
