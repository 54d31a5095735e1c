//! `image`: base images that VMs are created from.

use super::connector::{Connector, operate};
use super::context::Context;
use super::image_export;
use super::image_list::on_host;
use super::image_pull;
use super::image_register;
use super::output::{self, age, size};
use super::printer::Printer;
use super::provision::{self, Recipe};
use super::signals::Interrupts;
use crate::api::Empty;
use crate::api::daemon::Info;
use crate::api::image::{
    Image, ImageBuild, ImageBuildRequest, ImageDelete, ImagePromote, ImagePrune, ImagePruneReply,
    ImagePruneRequest, ImageRequest, ImageShow, ImageShowReply, ImageTag, ImageTagRequest,
};
use crate::client::{Client, Result};
use crate::error::Error;
use crate::host::plural::count;
use crate::host::shell::quote;
use crate::host::text::printable;
use crate::ids::ImageRef;
use std::path::PathBuf;

#[derive(clap::Subcommand, Debug)]
pub(super) enum Verb {
    /// Build an image from the distribution's packages, or with a script. An image of packages has
    /// compilers, Python, the usual tools and a user dev who may use sudo
    Build(BuildArgs),
    /// Make an image of a stopped VM's disk, without the keys and logs of the guest
    Commit {
        /// Name, ID, or ID prefix
        vm: String,
        /// Name of the new image
        #[arg(value_name = "NAME")]
        image: ImageRef,
    },
    /// Pull an image from a registry or an archive
    Pull(image_pull::Args),
    /// Register your file with an ext4 file system as an image. The file stays where it is
    Register(image_register::Args),
    /// Write an image to a file for docker load, or only its file system
    Export(image_export::Args),
    /// Copy the file of a registered image, so that the image no longer depends on it
    Promote { image: ImageRef },
    /// Store your credential for a registry where docker keeps it
    Login(super::registry_login::LoginArgs),
    /// Remove your credential for a registry
    Logout(super::registry_login::LogoutArgs),
    /// List images
    #[command(visible_alias = "ls")]
    List(super::image_list::Args),
    /// Show an image: its digest, configuration and layers
    #[command(visible_alias = "inspect")]
    Show { image: ImageRef },
    /// Show the steps that made an image
    History { image: ImageRef },
    /// Give an image an additional name
    Tag {
        image: ImageRef,
        /// The additional name
        name: ImageRef,
        /// Let all users use the image under the additional name; only root may do this
        #[arg(long)]
        shared: bool,
    },
    /// Delete images that no VM or snapshot needs
    #[command(name = "rm", visible_alias = "delete")]
    Delete {
        #[arg(required = true, value_name = "NAME")]
        images: Vec<ImageRef>,
    },
    /// Remove cached layers and guest runtimes that nothing needs
    Prune {
        /// Also delete your images that no VM and no snapshot uses
        #[arg(short, long)]
        all: bool,
    },
}

#[derive(clap::Args, Debug)]
pub(super) struct BuildArgs {
    /// Name of the image [default: default]
    name: Option<ImageRef>,
    /// Install this package too. Can be repeated
    #[arg(long, value_name = "PACKAGE", value_delimiter = ',')]
    include: Vec<String>,
    /// Install only what fcd needs
    #[arg(long, conflicts_with_all = ["script", "from"])]
    minimal: bool,
    /// Run this script as root in a new VM, whose disk becomes the image
    #[arg(long, value_name = "FILE", requires = "name")]
    script: Option<PathBuf>,
    /// Start from this image instead of packages, and pull it if this host does not have it
    /// [default with --script: default]
    #[arg(long, value_name = "IMAGE", requires = "name")]
    from: Option<ImageRef>,
    /// Explain how to get the image of a Dockerfile
    #[arg(short, long, value_name = "DOCKERFILE")]
    file: Option<PathBuf>,
}

pub(super) fn run(ctx: &mut Context, verb: Verb) -> Result<u8> {
    match verb {
        Verb::Build(args) => build(ctx, args),
        Verb::Commit { vm, image } => {
            let interrupts = Interrupts::start(&ctx.signals, &ctx.stdio.stderr)?;
            let made = provision::commit(ctx, &interrupts, vm, image);
            report_made(&mut ctx.printer, &interrupts, made)
        }
        Verb::Pull(args) => pull(ctx, args),
        Verb::Register(args) => register(ctx, args),
        Verb::Login(args) => super::registry_login::login(ctx, args),
        Verb::Logout(args) => super::registry_login::logout(ctx, &args),
        Verb::Promote { image } => promote(ctx, image),
        Verb::Export(args) => export(ctx, &args),
        Verb::Show { image } => show(&mut ctx.connector, &mut ctx.printer, ctx.now_s, image),
        Verb::History { image } => history(&mut ctx.connector, &mut ctx.printer, image),
        Verb::Tag {
            image,
            name,
            shared,
        } => {
            let request = ImageTagRequest {
                image,
                name,
                shared,
            };
            tag(&mut ctx.connector, &mut ctx.printer, &request)
        }
        Verb::Prune { all } => prune(&mut ctx.connector, &mut ctx.printer, all),
        Verb::List(args) => super::image_list::run(ctx, args),
        Verb::Delete { images } => delete(&mut ctx.connector, &mut ctx.printer, &images),
    }
}

fn build(ctx: &mut Context, args: BuildArgs) -> Result<u8> {
    if let Some(file) = &args.file {
        let text = format!(
            "fcctl does not read Dockerfiles, such as {}",
            file.display()
        );
        return Err(no_dockerfile(text).into());
    }
    let interrupts = Interrupts::start(&ctx.signals, &ctx.stdio.stderr)?;
    let made = match args.name {
        Some(name) if args.script.is_some() || args.from.is_some() => {
            let recipe = Recipe {
                name,
                from: args.from,
                include: args.include,
                script: args.script,
            };
            provision::build(ctx, &interrupts, recipe)
        }
        name => {
            let request = ImageBuildRequest {
                name,
                include: args.include,
                minimal: args.minimal,
            };
            let mut client = ctx.connector.connect(&mut ctx.printer)?;
            let _guard = interrupts.guard(&client)?;
            operate::<ImageBuild>(&ctx.printer, &mut client, "build image", &request)
                .map(|reply| reply.image)
        }
    };
    report_made(&mut ctx.printer, &interrupts, made)
}

/// Returns the error for a user who wants to build from a Dockerfile.
pub(super) fn no_dockerfile(text: impl Into<String>) -> Error {
    Error::invalid(text).hint(
        "build with docker or buildah, then: docker save app | fcctl image pull -\n\
         or: buildah push app oci-archive:app.tar && fcctl image pull oci-archive:app.tar\n\
         or write a script: fcctl image build --script FILE NAME",
    )
}

fn report_made(printer: &mut Printer, interrupts: &Interrupts, made: Result<Image>) -> Result<u8> {
    match interrupts.or_interrupted(made) {
        Err(_) if interrupts.cause().is_some() => {
            printer.note("interrupted; fcd cancels it");
            Ok(interrupts.status().unwrap_or(1))
        }
        Err(e) => Err(e),
        Ok(image) => {
            if printer.json {
                printer.document(&image)?;
            } else {
                printer.line(&format!(
                    "{}: {}, {}, {} on this host",
                    image.name,
                    image.os,
                    image.kernel,
                    size(image.allocated_bytes)
                ))?;
            }
            Ok(0)
        }
    }
}

fn pull(ctx: &mut Context, args: image_pull::Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        signals,
        env,
        ..
    } = ctx;
    let interrupts = Interrupts::start(signals, &stdio.stderr)?;
    let mut client = connector.connect(printer)?;
    let guard = interrupts.guard(&client)?;
    let result = image_pull::pull(&mut client, printer, &interrupts, &stdio.stdin, env, args);
    drop(guard);
    match interrupts.or_interrupted(result) {
        Err(_) if interrupts.cause().is_some() => {
            printer.note("interrupted; fcd cancels the pull");
            Ok(interrupts.status().unwrap_or(1))
        }
        Err(e) => Err(e),
        Ok(image) => {
            if printer.json {
                printer.document(&image)?;
            } else {
                printer.line(&format!(
                    "{}: {}, {} on this host",
                    image.name,
                    image.digest.as_deref().unwrap_or("no digest"),
                    size(image.allocated_bytes)
                ))?;
            }
            Ok(0)
        }
    }
}

fn register(ctx: &mut Context, args: image_register::Args) -> Result<u8> {
    let interrupts = Interrupts::start(&ctx.signals, &ctx.stdio.stderr)?;
    let mut client = ctx.connector.connect(&mut ctx.printer)?;
    let guard = interrupts.guard(&client)?;
    let result = image_register::register(&mut client, &ctx.printer, args);
    drop(guard);
    match interrupts.or_interrupted(result) {
        Err(_) if interrupts.cause().is_some() => {
            ctx.printer
                .note("interrupted; fcd cancels the registration");
            Ok(interrupts.status().unwrap_or(1))
        }
        Err(e) => Err(e),
        Ok(image) => {
            if ctx.printer.json {
                ctx.printer.document(&image)?;
            } else {
                let file = image.file.as_ref().map_or("", |file| file.path.as_str());
                ctx.printer.line(&format!(
                    "{}: {}, in place at {}",
                    image.name,
                    size(image.disk_bytes),
                    printable(file)
                ))?;
            }
            Ok(0)
        }
    }
}

fn promote(ctx: &mut Context, image: ImageRef) -> Result<u8> {
    let interrupts = Interrupts::start(&ctx.signals, &ctx.stdio.stderr)?;
    let mut client = ctx.connector.connect(&mut ctx.printer)?;
    let guard = interrupts.guard(&client)?;
    let doing = format!("promote image {image}");
    let request = ImageRequest { image };
    let promoted = operate::<ImagePromote>(&ctx.printer, &mut client, &doing, &request);
    drop(guard);
    let image = promoted.map(|reply| reply.image);
    report_made(&mut ctx.printer, &interrupts, image)
}

fn export(ctx: &mut Context, args: &image_export::Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        signals,
        ..
    } = ctx;
    if printer.json && args.is_stdout() {
        let text = "an image on stdout cannot be one JSON document";
        return Err(Error::invalid(text).hint("name a file: -o FILE").into());
    }
    let interrupts = Interrupts::start(signals, &stdio.stderr)?;
    let mut client = connector.connect(printer)?;
    let guard = interrupts.guard(&client)?;
    let result = image_export::export(&mut client, printer, &interrupts, stdio, args);
    drop(guard);
    match interrupts.or_interrupted(result) {
        Err(_) if interrupts.cause().is_some() => {
            printer.note(if args.is_stdout() {
                "interrupted; the image is incomplete"
            } else {
                "interrupted; nothing was written"
            });
            Ok(interrupts.status().unwrap_or(1))
        }
        Err(e) => Err(e),
        Ok(reply) => {
            if printer.json {
                printer.document(&reply)?;
            } else {
                // stdout may be the image.
                printer.note(&format!("{} written", size(reply.bytes)));
            }
            Ok(0)
        }
    }
}

fn show(
    connector: &mut Connector,
    printer: &mut Printer,
    now_s: u64,
    image: ImageRef,
) -> Result<u8> {
    let reply = connector
        .connect(printer)?
        .call::<ImageShow>(&ImageRequest { image })?;
    if printer.json {
        printer.document(&reply)?;
        return Ok(0);
    }
    printer.text(&description(&reply, now_s))?;
    Ok(0)
}

/// Describes an image, one property per line. Properties that the image does not have are left out.
fn description(reply: &ImageShowReply, now_s: u64) -> String {
    let (image, config) = (&reply.image, &reply.config);
    let words = |words: &[String]| words.iter().map(|w| quote(w)).collect::<Vec<_>>().join(" ");
    let file = image.file.as_ref();
    let lines = [
        ("name", image.name.to_string()),
        ("digest", image.digest.clone().unwrap_or_default()),
        ("source", image.source.clone().unwrap_or_default()),
        ("file", file.map(|f| f.path.clone()).unwrap_or_default()),
        (
            "changed",
            file.and_then(|f| f.changed.clone()).unwrap_or_default(),
        ),
        ("os", image.os.clone()),
        ("kernel", image.kernel.clone()),
        ("disk", size(image.disk_bytes)),
        ("on host", on_host(image)),
        ("built", age(now_s, image.built_at)),
        ("vms", image.vms.to_string()),
        ("user", config.user.clone()),
        ("workdir", config.working_dir.clone()),
        ("entrypoint", words(&config.entrypoint)),
        ("command", words(&config.cmd)),
    ];
    let env = config.env.iter().map(|e| ("env", e.clone()));
    let layers = reply.layers.iter().map(|l| ("layer", l.clone()));
    lines
        .into_iter()
        .chain(env)
        .chain(layers)
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| format!("{:<12}{}\n", format!("{name}:"), printable(&value)))
        .collect()
}

fn history(connector: &mut Connector, printer: &mut Printer, image: ImageRef) -> Result<u8> {
    let reply = connector
        .connect(printer)?
        .call::<ImageShow>(&ImageRequest { image })?;
    if printer.json {
        printer.document(&reply.history)?;
        return Ok(0);
    }
    // The newest step is first, as in docker.
    let rows: Vec<_> = reply
        .history
        .iter()
        .rev()
        .map(|step| {
            let created = step.created.as_deref().unwrap_or("-");
            // The date without the time.
            let date = created.split('T').next().unwrap_or(created);
            let layer = if step.empty_layer { "no" } else { "yes" };
            let command = step.created_by.as_deref().unwrap_or_default();
            let command = printable(&command.split_whitespace().collect::<Vec<_>>().join(" "));
            vec![printable(date), layer.to_owned(), command]
        })
        .collect();
    printer.text(&output::table(&["CREATED", "LAYER", "CREATED BY"], &rows))?;
    if reply.history_omitted > 0 {
        let steps = count(reply.history_omitted, "older step");
        printer.note(&format!(
            "{steps} not shown, because the history is too long"
        ));
    }
    Ok(0)
}

fn tag(connector: &mut Connector, printer: &mut Printer, request: &ImageTagRequest) -> Result<u8> {
    let reply = connector.connect(printer)?.call::<ImageTag>(request)?;
    if printer.json {
        printer.document(&reply.image)?;
    } else {
        printer.line(&format!("{}: tagged", reply.image.name))?;
    }
    Ok(0)
}

fn prune(connector: &mut Connector, printer: &mut Printer, all: bool) -> Result<u8> {
    let mut client = connector.connect(printer)?;
    let reply = client.call::<ImagePrune>(&ImagePruneRequest { all })?;
    if printer.json {
        printer.document(&reply)?;
        return Ok(0);
    }
    for image in &reply.images {
        printer.line(&format!("{image}: deleted"))?;
    }
    let has_removed_layers = reply.layers > 0 || !reply.runtimes.is_empty();
    if has_removed_layers || may_remove_layers(&mut client)? {
        printer.line(&format!(
            "removed {} and {}, {} in all",
            count(reply.layers, "cached layer"),
            count(reply.runtimes.len() as u64, "guest runtime"),
            size(reply.bytes)
        ))?;
    } else {
        printer.line(&pruned_by_user(&reply, all))?;
    }
    Ok(0)
}

/// True if this user may remove cached layers and guest runtimes, which serve all users.
fn may_remove_layers(client: &mut Client) -> Result<bool> {
    let uid = nix::unistd::geteuid().as_raw();
    Ok(uid == 0 || uid == client.call::<Info>(&Empty {})?.uid)
}

/// Describes the result of a prune that could remove only the caller's images.
fn pruned_by_user(reply: &ImagePruneReply, all: bool) -> String {
    const WHY: &str = "cached layers and guest runtimes serve all users, so only root removes them";
    match (all, reply.images.is_empty()) {
        (false, _) => format!(
            "nothing was removed: {WHY}. To delete your unused images: fcctl image prune --all"
        ),
        (true, true) => format!("nothing was removed: you have no unused image, and {WHY}"),
        (true, false) => format!("freed {}; {WHY}", size(reply.bytes)),
    }
}

fn delete(connector: &mut Connector, printer: &mut Printer, images: &[ImageRef]) -> Result<u8> {
    let is_one = images.len() == 1;
    connector.for_all(printer, images, is_one, |printer, client, image| {
        let request = ImageRequest {
            image: image.clone(),
        };
        let reply = client.call::<ImageDelete>(&request)?;
        printer.say(&format!("{}: deleted", reply.deleted))?;
        Ok(reply)
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, fcctl};
    use super::*;
    use crate::client::fake::Fake;
    use expect_test::expect;
    use serde_json::json;

    #[test]
    fn prune_by_ordinary_user_says_what_it_cannot_remove() {
        let mut reply = ImagePruneReply::default();
        let why = "cached layers and guest runtimes serve all users, so only root removes them";
        assert_eq!(
            pruned_by_user(&reply, false),
            format!(
                "nothing was removed: {why}. To delete your unused images: fcctl image prune --all"
            )
        );
        assert_eq!(
            pruned_by_user(&reply, true),
            format!("nothing was removed: you have no unused image, and {why}")
        );
        reply.images.push("app".parse().unwrap());
        reply.bytes = 5 << 20;
        assert_eq!(pruned_by_user(&reply, true), format!("freed 5 MiB; {why}"));
    }

    /// In this test, the daemon runs as the user of fcctl, who may therefore remove everything.
    #[test]
    fn prune_by_owner_of_daemon_counts_layers() {
        let fake = Fake::start(|r| match r.method.as_str() {
            "fcd.info" => r.result(json!({
                "api": { "major": 1, "minor": 0 }, "version": "1", "features": [], "pid": 1,
                "uid": nix::unistd::geteuid().as_raw(), "state_dir": "/", "uptime_s": 1,
                "guest_roots": []
            })),
            _ => r.result(json!({ "images": [], "layers": 0, "runtimes": [], "bytes": 0 })),
        });
        let ran = fcctl(&fake, &["image", "prune"]);
        assert_eq!(
            String::from_utf8(ran.out).unwrap(),
            "removed 0 cached layers and 0 guest runtimes, 0 B in all\n"
        );
    }

    #[test]
    fn image_rm_deletes_each() {
        let fake = Fake::start(|r| {
            let image = r.params["image"].clone();
            r.result(json!({ "deleted": image }));
        });
        for rm in ["rm", "delete"] {
            check(
                &fake,
                &["image", rm, "one", "two"],
                expect![[r#"
                    > image.delete {"image":"one"}
                    > image.delete {"image":"two"}
                    one: deleted
                    two: deleted
                    status 0
                "#]],
            );
        }
    }
}
