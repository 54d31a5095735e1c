//! `image build --script` and `image commit`: makes an image of the disk of a VM.
//!
//! Both work in a new VM, which the daemon deletes when the connection that holds it closes,
//! whatever happens to this process. `image build` runs the script there. `image commit` must not
//! change the disk of the caller's VM. It therefore makes an intermediate image of the unchanged
//! disk, and creates the new VM from that. If fcctl cannot delete the intermediate image, the
//! daemon does. In both cases the guest then removes what must differ between VMs, and the disk of
//! the stopped VM becomes the image.

use super::connector::operate;
use super::context::Context;
use super::printer::Printer;
use super::run::{self, NewVm};
use super::signals::Interrupts;
use crate::api::image::{
    Image, ImageCommit, ImageCommitRequest, ImageDelete, ImageList, ImageRequest, ImageShow,
    ImageTag, ImageTagRequest,
};
use crate::api::page::ListRequest;
use crate::api::vm::{Synced, VmCreateRequest, VmStop, VmStopRequest};
use crate::client::{Client, Result};
use crate::error::{Error, Kind};
use crate::host::shell::{quote, quote_bytes};
use crate::host::text::printable;
use crate::host::{hex, random};
use crate::ids::ImageRef;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::path::Path;

/// The version of the steps that a build adds to its script. An image that another version built is
/// built again.
const RECIPE_VERSION: &str = "fcd script 2";
/// Longest script. Scripts are read into memory.
const SCRIPT_BYTES_MAX: u64 = 16 << 20;
/// Runs the script that comes on stdin. `/dev/shm` is in memory in every guest, so the script does
/// not become part of the image. The guest runtime's programs come first, because an image may have
/// none. The script itself gets the image's `PATH`.
const RUN_SCRIPT: &str = "path=$PATH PATH=/.fcd/bin:$PATH
cat >/dev/shm/fcd-script && chmod 700 /dev/shm/fcd-script || exit
PATH=$path
exec /dev/shm/fcd-script </dev/null";
/// Removes what must differ between the VMs of an image. The guest runtime's programs are used if
/// there are any, because an image may have none, or different ones of the same names. The
/// runtime's init keeps a copy of each file that it writes to `/etc`. Such a file does not belong
/// to the image either, unless it was changed since.
const CLEAN: &str = "set -e
if [ -x /.fcd/bin/busybox ]; then
  PATH=/.fcd/bin
  for copy in /.fcd/run/written/*; do
    file=/etc/${copy##*/}
    if cmp -s \"$copy\" \"$file\"; then rm \"$file\"; fi
  done
fi
rm -f /etc/ssh/ssh_host_* /var/lib/dbus/machine-id /var/lib/systemd/random-seed
if [ -e /etc/machine-id ]; then : >/etc/machine-id; fi
if [ -d /var/log ]; then find /var/log -type f -exec rm -f {} +; fi
rm -f /root/.bash_history";

/// The description of an image to build.
pub(super) struct Recipe {
    pub name: ImageRef,
    /// The image to start from. It is pulled if this host does not have it. Defaults to the image
    /// `default`, which is never pulled.
    pub from: Option<ImageRef>,
    /// Packages to install before the script runs.
    pub include: Vec<String>,
    pub script: Option<std::path::PathBuf>,
}

/// Builds an image with a script. Does nothing if the image was already built from the same base
/// and script.
pub(super) fn build(ctx: &mut Context, interrupts: &Interrupts, recipe: Recipe) -> Result<Image> {
    let script = whole_script(&recipe)?;
    let base = find_base(ctx, interrupts, recipe.from)?;
    let images = ctx
        .connector
        .connect(&mut ctx.printer)?
        .list::<ImageList>(ListRequest::default())?;
    let mut present = images.iter().filter(|image| image.name == recipe.name);
    let key = recipe_key(&base, &script);
    let own_uid = rustix::process::geteuid().as_raw();
    if let Some(image) = present.find(|image| has_taken_name(image, own_uid)) {
        if !is_built_from(image, &key) {
            let text = format!("image {} already exists", recipe.name);
            return Err(Error::new(Kind::NameTaken, text)
                .hint(format!(
                    "choose another name, or delete it first: fcctl image rm {}",
                    recipe.name
                ))
                .into());
        }
        ctx.printer
            .note("the image was already built from this base and script");
        return Ok(image.clone());
    }
    if let Some(image) = images.iter().find(|image| is_built_from(image, &key)) {
        let text = format!(
            "image {} was already built from this base and script",
            image.name
        );
        ctx.printer.note(&text);
        return tag(ctx, interrupts, image, recipe.name);
    }
    let target = ImageCommitRequest {
        vm: String::new(),
        image: recipe.name,
        recipe: Some(key),
        temporary: false,
    };
    in_new_vm(ctx, interrupts, base.name, &target, Some(&script))
}

fn find_base(ctx: &mut Context, interrupts: &Interrupts, from: Option<ImageRef>) -> Result<Image> {
    let Context {
        connector,
        printer,
        stdio,
        env,
        ..
    } = ctx;
    let shown = match from {
        Some(image) => run::find_or_pull(connector, printer, stdio, env, interrupts, &image)?,
        None => {
            let image = "default".parse().expect("a valid name");
            let mut client = connector.connect(printer)?;
            client.call::<ImageShow>(&ImageRequest { image })?
        }
    };
    Ok(shown.image)
}

/// True if this user cannot create an image with the name of `image`. Images of an ordinary user
/// have their own names, which may be the same as those of images that all users share.
fn has_taken_name(image: &Image, uid: u32) -> bool {
    uid == 0 || image.owner_uid.is_none_or(|owner| owner == uid)
}

/// True if this user built the image with this recipe. An image of another user is not trusted,
/// because its owner chose the recorded recipe.
fn is_built_from(image: &Image, key: &str) -> bool {
    let own_uid = rustix::process::geteuid().as_raw();
    image.recipe.as_deref() == Some(key) && image.owner_uid == Some(own_uid)
}

fn tag(ctx: &mut Context, interrupts: &Interrupts, image: &Image, name: ImageRef) -> Result<Image> {
    let mut client = ctx.connector.connect(&mut ctx.printer)?;
    let _guard = interrupts.guard(&client)?;
    let request = ImageTagRequest {
        image: image.name.clone(),
        name,
        shared: false,
    };
    Ok(client.call::<ImageTag>(&request)?.image)
}

/// Makes an image of a stopped VM's disk.
pub(super) fn commit(
    ctx: &mut Context,
    interrupts: &Interrupts,
    vm: String,
    image: ImageRef,
) -> Result<Image> {
    let as_it_is: ImageRef = format!("commit-{}", hex::encode(&random::bytes::<6>())).parse()?;
    let raw = ImageCommitRequest {
        vm,
        image: as_it_is.clone(),
        recipe: None,
        temporary: true,
    };
    let mut client = ctx.connector.connect(&mut ctx.printer)?;
    take_disk(&mut ctx.printer, interrupts, &mut client, &raw)?;
    let target = ImageCommitRequest {
        vm: String::new(),
        image,
        recipe: None,
        temporary: false,
    };
    let made = in_new_vm(ctx, interrupts, as_it_is.clone(), &target, None);
    let removed = Client::connect_again(client.socket()).and_then(|mut client| {
        client.call::<ImageDelete>(&ImageRequest {
            image: as_it_is.clone(),
        })
    });
    // The daemon deletes the image itself if it is unused for a while.
    if let Err(e) = removed
        && !e.is(Kind::ImageNotFound)
    {
        let e = e.context(format!("delete the intermediate image {as_it_is}"));
        ctx.printer
            .fail(&e.hint(format!("delete it: fcctl image rm {as_it_is}")), 1);
    }
    made
}

/// Returns the script, preceded by the installation of the packages. It is empty if there is
/// nothing to run.
fn whole_script(recipe: &Recipe) -> Result<Vec<u8>> {
    let script = match &recipe.script {
        Some(path) => read_script(path)?,
        None => Vec::new(),
    };
    if recipe.include.is_empty() {
        return Ok(script);
    }
    let packages: Vec<String> = recipe.include.iter().map(|name| quote(name)).collect();
    let mut whole = format!(
        "#!/bin/sh\nset -e\n{}export DEBIAN_FRONTEND=noninteractive\napt-get -q update\n\
         apt-get -q -y --no-install-recommends install -- {}\n",
        require("command -v apt-get >/dev/null", "--include needs apt-get"),
        packages.join(" ")
    )
    .into_bytes();
    // The script runs with its own interpreter, which may come from one of the packages.
    if let Some(program) = interpreter(&script) {
        let line = require_interpreter(&program);
        whole.extend([line.as_bytes(), b"printf %s ", &quote_bytes(&script)].concat());
        whole.extend(b" >/dev/shm/fcd-rest\nchmod 700 /dev/shm/fcd-rest\nexec /dev/shm/fcd-rest\n");
    }
    Ok(whole)
}

fn read_script(path: &Path) -> Result<Vec<u8>> {
    let doing = || format!("read the script {}", path.display());
    let file = File::open(path).map_err(|e| Error::io(doing(), e))?;
    let bytes = crate::host::command::read_bounded(file, SCRIPT_BYTES_MAX + 1)
        .map_err(|e| Error::io(doing(), e))?;
    if bytes.is_empty() || bytes.len() as u64 > SCRIPT_BYTES_MAX {
        let text = format!(
            "{}: it is empty, or has more than {SCRIPT_BYTES_MAX} bytes",
            doing()
        );
        return Err(Error::invalid(text).into());
    }
    if interpreter(&bytes).is_none() {
        let text = format!("{}: it does not begin with a #! line", doing());
        return Err(Error::invalid(text)
            .hint("name the program that runs it in the first line, such as #!/bin/sh")
            .into());
    }
    Ok(bytes)
}

/// Returns the program that runs a script, which the first line names (execve(2)).
fn interpreter(script: &[u8]) -> Option<String> {
    let line = script.strip_prefix(b"#!")?.split(|b| *b == b'\n').next()?;
    let words = line.trim_ascii_start().split(|b| b" \t".contains(b));
    let program = String::from_utf8(words.into_iter().next()?.to_vec()).ok()?;
    Some(program).filter(|program| !program.is_empty())
}

/// Returns a line of a shell script that fails if the image does not have the program.
fn require_interpreter(program: &str) -> String {
    let word = quote(program);
    let needs = format!("the script needs {}", printable(program));
    require(&format!("[ -f {word} ] && [ -x {word} ]"), &needs)
}

fn require(condition: &str, needs: &str) -> String {
    let text = quote(&format!("fcd: {needs}, which the image does not have"));
    format!("{condition} || {{ printf '%s\\n' {text} >&2; exit 127; }}\n")
}

/// Returns a hash of what a build depends on: the base, the script and [`RECIPE_VERSION`]. An image
/// with the same hash is not built again.
fn recipe_key(base: &Image, script: &[u8]) -> String {
    let mut hash = Sha256::new();
    for part in [
        RECIPE_VERSION.as_bytes(),
        base.digest.as_deref().unwrap_or_default().as_bytes(),
        script,
    ] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    format!("sha256:{}", hex::encode(&hash.finalize()))
}

/// Runs the script in a new VM of `from` and makes its disk the image. The VM is deleted.
fn in_new_vm(
    ctx: &mut Context,
    interrupts: &Interrupts,
    from: ImageRef,
    target: &ImageCommitRequest,
    script: Option<&[u8]>,
) -> Result<Image> {
    let client = ctx.connector.connect(&mut ctx.printer)?;
    let request = VmCreateRequest {
        image: Some(from),
        rm: true,
        hold: true,
        ..VmCreateRequest::default()
    };
    let (printer, stdio) = (&mut ctx.printer, &ctx.stdio);
    let mut new_vm = NewVm::held(client, interrupts, &request)?;
    let made = run::boot(printer, interrupts, &mut new_vm, None).and_then(|()| {
        if let Some(script) = script.filter(|script| !script.is_empty()) {
            let check = interpreter(script).map_or_else(String::new, |p| require_interpreter(&p));
            let run_it = format!("{check}{RUN_SCRIPT}");
            let argv = ["sh", "-c", &run_it];
            new_vm
                .guest(printer, stdio, interrupts)
                .as_root(&argv, script)
                .map_err(|e| e.context("the script").hint("no image was made"))?;
        }
        new_vm
            .guest(printer, stdio, interrupts)
            .as_root(&["sh", "-c", CLEAN], b"")
            .map_err(|e| e.context("remove keys and logs in the guest"))?;
        stop(printer, interrupts, &mut new_vm)?;
        let request = ImageCommitRequest {
            vm: new_vm.vm.id.to_string(),
            ..target.clone()
        };
        take_disk(printer, interrupts, &mut new_vm.client, &request)
    });
    run::remove(printer, interrupts, &new_vm);
    made
}

/// Stops the guest. Fails if it did not shut down cleanly.
fn stop(printer: &mut Printer, interrupts: &Interrupts, new_vm: &mut NewVm) -> Result<()> {
    let name = new_vm.vm.name.clone();
    let request = VmStopRequest {
        vm: new_vm.vm.id.to_string(),
        force: false,
        timeout_ms: None,
        keep: true,
    };
    let _guard = interrupts.guard(&new_vm.client)?;
    let reply = operate::<VmStop>(
        printer,
        &mut new_vm.client,
        &format!("stop {name}"),
        &request,
    )?;
    if reply.vm.synced == Some(Synced::Yes) {
        return Ok(());
    }
    let text = format!("VM {name} did not shut down cleanly, so its disk may be damaged");
    Err(Error::new(Kind::GuestUnavailable, text)
        .hint("try again")
        .into())
}

fn take_disk(
    printer: &mut Printer,
    interrupts: &Interrupts,
    client: &mut Client,
    request: &ImageCommitRequest,
) -> Result<Image> {
    let _guard = interrupts.guard(client)?;
    let doing = format!("make image {}", request.image);
    Ok(operate::<ImageCommit>(printer, client, &doing, request)?.image)
}

#[cfg(test)]
#[path = "provision_tests.rs"]
mod tests;
