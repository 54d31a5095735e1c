//! `image`: base images that VMs are created from.

use super::connector::Connector;
use super::context::{Context, Stdio};
use super::output::{self, age, size};
use super::printer::Printer;
use super::signals::{Interrupts, SignalSource};
use crate::api::frame::Note;
use crate::api::image::{
    Image, ImageBuild, ImageBuildRequest, ImageDelete, ImageList, ImageRequest,
};
use crate::api::page::ListRequest;
use crate::client::Result;
use crate::ids::ImageRef;

#[derive(clap::Subcommand, Debug)]
pub(super) enum Verb {
    /// Build an image from the distribution's packages. It has compilers, Python, the usual tools
    /// and a user dev who may use sudo
    Build {
        /// Name of the image [default: default]
        name: Option<ImageRef>,
        /// Install this package too. Can be repeated
        #[arg(long, value_name = "PACKAGE", value_delimiter = ',')]
        include: Vec<String>,
        /// Install only what fcd needs
        #[arg(long)]
        minimal: bool,
    },
    /// List images
    #[command(visible_alias = "ls")]
    List,
    /// Delete images that no VM or snapshot needs
    #[command(name = "rm", visible_alias = "delete")]
    Delete {
        #[arg(required = true, value_name = "NAME")]
        images: Vec<ImageRef>,
    },
}

pub(super) fn run(ctx: &mut Context, verb: Verb) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        signals,
        now_s,
        ..
    } = ctx;
    match verb {
        Verb::Build {
            name,
            include,
            minimal,
        } => build(
            connector,
            printer,
            stdio,
            signals,
            ImageBuildRequest {
                name,
                include,
                minimal,
            },
        ),
        Verb::List => list(connector, printer, *now_s),
        Verb::Delete { images } => delete(connector, printer, images),
    }
}

fn build(
    connector: &mut Connector,
    printer: &mut Printer,
    stdio: &Stdio,
    signals: &SignalSource,
    request: ImageBuildRequest,
) -> Result<u8> {
    let interrupts = Interrupts::start(signals, &stdio.stderr)?;
    let mut client = connector.connect(printer)?;
    let guard = interrupts.guard(&client)?;
    let mut progress = printer.progress("build image");
    let result = client.call_more::<ImageBuild>(&request, &[], &mut |note| {
        if let Note::Progress(p) = note {
            progress.update(&p);
        }
        Ok(())
    });
    drop((progress, guard));
    match interrupts.or_interrupted(result) {
        Err(_) if interrupts.cause().is_some() => {
            printer.note("interrupted; fcd cancels the build");
            Ok(interrupts.status().unwrap_or(1))
        }
        Err(e) => Err(e),
        Ok(reply) => {
            let image = reply.image;
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

fn delete(connector: &mut Connector, printer: &mut Printer, images: Vec<ImageRef>) -> Result<u8> {
    let mut client = connector.connect(printer)?;
    for image in images {
        let reply = client.call::<ImageDelete>(&ImageRequest { image })?;
        if printer.json {
            printer.document(&reply)?;
        } else {
            printer.line(&format!("{}: deleted", reply.deleted))?;
        }
    }
    Ok(0)
}

fn list(connector: &mut Connector, printer: &mut Printer, now_s: u64) -> Result<u8> {
    let images = connector
        .connect(printer)?
        .list::<ImageList>(ListRequest::default())?;
    if printer.json {
        printer.document(&images)?;
        return Ok(0);
    }
    let row = |image: &Image| {
        vec![
            image.name.to_string(),
            image.os.clone(),
            image.kernel.clone(),
            size(image.disk_bytes),
            size(image.allocated_bytes),
            age(now_s, image.built_at),
            image.vms.to_string(),
        ]
    };
    let rows: Vec<_> = images.iter().map(row).collect();
    printer.text(&output::table(
        &["NAME", "OS", "KERNEL", "DISK", "ON HOST", "BUILT", "VMS"],
        &rows,
    ))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::super::tests::check;
    use crate::client::fake::Fake;
    use expect_test::expect;
    use serde_json::json;

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
