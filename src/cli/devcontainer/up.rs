//! `up`: reads the file, makes or starts the VM, copies the directory, and runs the commands.

use super::super::connector::operate;
use super::super::context::Context;
use super::super::guest::{self, Gift, Guest};
use super::super::printer::Printer;
use super::super::run::find_or_pull;
use super::super::signals::{Interrupts, interrupted};
use super::super::transfer::{PrepareHow, Source, Transfer};
use super::super::values::{Publish, published};
use super::super::vm_text::{port_line, refused_line};
use super::consent::{self, Confirmed};
use super::file::{self, Project};
use super::parse::{self, Config};
use super::steps::Steps;
use super::variables::Variables;
use super::{UpArgs, find, own_uid};
use crate::api::image::ImageConfig;
use crate::api::port::{Port, Protocol, loopback};
use crate::api::vm::{
    Vm, VmCreate, VmCreateRequest, VmPortAdd, VmPortsRequest, VmRequest, VmResume, VmStart, VmState,
};
use crate::client::{Client, Result};
use crate::error::{Error, Kind};
use crate::ids::Labels;
use crate::workspace::guest_path;
use crate::workspace::plan::Plan;

/// The directory in the guest for projects with a file. Other tools use the same one.
const GUEST_ROOT: &str = "/workspaces";
/// The exit status if the user says no.
const DECLINED: u8 = 1;

/// Makes sure that the VM of a directory runs, with a copy of the directory as it is now.
pub(in super::super) fn run(ctx: &mut Context, args: UpArgs) -> Result<u8> {
    let interrupts = Interrupts::start(&ctx.signals, &ctx.stdio.stderr)?;
    let project = Project::find(&args.path, &Plan::top_of(&args.path)?)?;
    match bring_up(ctx, &interrupts, args, &project) {
        Err(_) if interrupts.cause().is_some() => {
            ctx.printer.note("interrupted; fcctl up continues");
            Ok(interrupts.status().unwrap_or(DECLINED))
        }
        result => result,
    }
}

fn bring_up(
    ctx: &mut Context,
    interrupts: &Interrupts,
    args: UpArgs,
    project: &Project,
) -> Result<u8> {
    let id = project.vm_name(own_uid());
    let mut how = args.workspace;
    let source = Source::tree(&project.dir, &how, interrupts.cancel())?;
    let mut guest_dir = None;
    let config = match &project.file {
        Some(file) => {
            let of_file = |e: Error| e.context(file.path.display().to_string());
            let members = parse::json(&file.text).map_err(of_file)?;
            parse::check_keys(&members).map_err(of_file)?;
            let dir_name = project.dir.file_name().unwrap_or_default();
            let dir_name = guest_path::sanitise(dir_name.as_encoded_bytes());
            let folder = parse::folder(&members, &dir_name).map_err(of_file)?;
            let dir = place(&source, &mut how, folder).map_err(of_file)?;
            let variables = Variables {
                guest_dir: &dir,
                name: &dir_name,
                id: &id,
                allowed: &args.allow_env,
                env: &*ctx.env,
            };
            let config = parse::config(members, &variables).map_err(of_file)?;
            for line in consent::summary(file, &config, &dir) {
                ctx.printer.note(&line);
            }
            let confirmed = Confirmed::of_user(&*ctx.env);
            if !args.yes
                && !consent::given(&mut ctx.printer, &ctx.stdio, interrupts, &confirmed, file)?
            {
                ctx.printer.note("nothing was done");
                return Ok(DECLINED);
            }
            guest_dir = Some(dir);
            config
        }
        None => Config::default(),
    };
    let vm = Machine {
        interrupts,
        config,
        project,
        guest_dir,
        publish: &args.publish,
    }
    .bring_up(ctx, source, how)?;
    report(&mut ctx.printer, &vm)
}

/// Chooses where the tree is copied in the guest, and returns the path of the project there. The
/// project may be a subdirectory of the repository that is copied.
fn place(
    source: &Source,
    how: &mut PrepareHow,
    folder: Option<String>,
) -> crate::error::Result<String> {
    let below = match source.subdir() {
        "" => String::new(),
        subdir => format!("/{subdir}"),
    };
    let is_from_file = how.guest_path.is_none() && folder.is_some();
    let top = how.guest_path.take().unwrap_or_else(|| match folder {
        Some(folder) => {
            let folder = folder.trim_end_matches('/');
            folder.strip_suffix(&below).unwrap_or(folder).to_owned()
        }
        None => source.path_for_root().replacen("/root", GUEST_ROOT, 1),
    });
    let top = guest_path::validate(&top).map_err(|e| {
        if is_from_file {
            e.context("workspaceFolder")
                .hint("choose another place: fcctl up --guest-path /workspaces/NAME")
        } else {
            e
        }
    })?;
    let guest_dir = format!("{top}{below}");
    how.guest_path = Some(top);
    Ok(guest_dir)
}

fn report(printer: &mut Printer, vm: &Vm) -> Result<u8> {
    let name = &vm.name;
    for port in &vm.ports {
        printer.note(&format!("port {}", port_line(port)));
    }
    match &vm.auto_ports {
        Some(auto) => {
            let refused = auto.refused.iter();
            refused.for_each(|port| printer.note(&refused_line(port)));
            printer.note(&format!(
                "whatever the VM listens on is forwarded; to list its ports: fcctl port {name}"
            ));
        }
        None => printer.note(&format!(
            "to forward whatever the VM listens on: fcctl port add {name} auto"
        )),
    }
    printer.note(&format!(
        "enter: fcctl ssh {name}, stop: fcctl down, delete: fcctl rm -f {name}"
    ));
    if printer.json {
        printer.document(vm)?;
    } else {
        printer.line(name.as_str())?;
    }
    Ok(0)
}

/// True if `asked` needs nothing more than `port`.
fn is_same(asked: &Port, port: &Port) -> bool {
    asked.guest_port == port.guest_port
        && asked.protocol == port.protocol
        && (asked.host_port == 0
            || (asked.host_addr, asked.host_port) == (port.host_addr, port.host_port))
}

/// The VM that a file describes.
struct Machine<'a> {
    interrupts: &'a Interrupts,
    config: Config,
    project: &'a Project,
    /// The directory of the project in the guest, if a file describes the VM.
    guest_dir: Option<String>,
    /// The ports that the user asks for.
    publish: &'a [Publish],
}

impl Machine<'_> {
    fn bring_up(&self, ctx: &mut Context, source: Source, mut how: PrepareHow) -> Result<Vm> {
        let mut client = ctx.connector.connect(&mut ctx.printer)?;
        let found = find(&mut client, self.project)?;
        let Context {
            connector,
            printer,
            stdio,
            env,
            ..
        } = ctx;
        let mut of_image = ImageConfig::default();
        if let (None, Some(image)) = (&found, &self.config.image) {
            of_image =
                find_or_pull(connector, printer, stdio, &**env, self.interrupts, image)?.config;
        }
        let (vm, was_running) = match found {
            Some(vm) => {
                self.report_differences(printer, &vm);
                let is_running = vm.state == VmState::Running;
                (self.publish(&mut client, vm)?, is_running)
            }
            None => (self.create(printer, &mut client, &of_image)?, false),
        };
        let vm = self.start(printer, &mut client, vm)?;
        let user = match &self.config.user {
            Some(user) => guest::unless_root(user.clone()),
            None => guest::user_of_image(&mut client, vm.image.clone())?,
        };
        let gift = user.and_then(|user| Gift::plan(&source, &mut how, user));
        self.copy(printer, &mut client, &vm, (source, how))?;
        let mut guest = Guest {
            printer,
            stdio,
            interrupts: self.interrupts,
            client: &mut client,
            vm: vm.id.as_str(),
        };
        if let Some(gift) = &gift {
            guest.give(gift)?;
        }
        let steps = Steps {
            config: &self.config,
            user: self.config.user.as_deref(),
        };
        steps.run(&mut guest, was_running).map_err(|e| {
            e.hint(format!(
                "look around: fcctl ssh {0}, then run fcctl up again; or delete the VM: fcctl rm -f {0}",
                vm.name
            ))
        })?;
        Ok(vm)
    }

    /// Warns about settings of an existing VM that differ from the file, because the VM keeps them.
    fn report_differences(&self, printer: &mut Printer, vm: &Vm) {
        let config = &self.config;
        let differs = [
            (
                "image",
                config
                    .image
                    .as_ref()
                    .is_some_and(|image| image.with_default_tag() != vm.image.with_default_tag()),
            ),
            ("vCPUs", config.cpus.is_some_and(|cpus| cpus != vm.vcpus)),
            (
                "memory",
                config.memory_mib.is_some_and(|mib| mib != vm.mem_mib),
            ),
            (
                "variables",
                config
                    .constants(&[])
                    .iter()
                    .any(|(name, _)| !vm.commands.env.contains(name)),
            ),
            (
                "user",
                config.user.is_some() && config.user != vm.commands.user,
            ),
            (
                "ports",
                !config
                    .ports
                    .iter()
                    .all(|port| vm.ports.iter().any(|p| p.guest_port == *port)),
            ),
        ];
        let names: Vec<&str> = differs
            .into_iter()
            .filter_map(|(name, differs)| differs.then_some(name))
            .collect();
        if !names.is_empty() {
            printer.note(&format!(
                "warning: VM {0} already exists and keeps its {1}; to create it again: fcctl rm -f {0} && fcctl up",
                vm.name,
                names.join(", ")
            ));
        }
    }

    /// Publishes the ports of the command line that an existing VM lacks.
    fn publish(&self, client: &mut Client, vm: Vm) -> Result<Vm> {
        let (mut ports, auto) = published(self.publish);
        ports.retain(|asked| !vm.ports.iter().any(|port| is_same(asked, port)));
        let auto = auto && vm.auto_ports.is_none();
        if ports.is_empty() && !auto {
            return Ok(vm);
        }
        let vm = vm.id.to_string();
        let request = VmPortsRequest { vm, ports, auto };
        Ok(client.call::<VmPortAdd>(&request)?.vm)
    }

    /// Returns the ports of the command line, and those of the file that are not among them. The
    /// host's ports of the latter are free ones if `any_free` is set.
    fn ports(&self, any_free: bool) -> Vec<Port> {
        let (mut ports, _) = published(self.publish);
        let is_new = |port: &Port| {
            let mut asked = ports.iter().filter(|p| p.protocol == port.protocol);
            asked.all(|p| p.guest_port != port.guest_port)
        };
        let of_file = self.config.ports.iter().map(|port| Port {
            host_addr: loopback(),
            host_port: if any_free { 0 } else { *port },
            guest_port: *port,
            protocol: Protocol::Tcp,
        });
        let of_file: Vec<Port> = of_file.filter(is_new).collect();
        ports.extend(of_file);
        ports
    }

    fn create(
        &self,
        printer: &mut Printer,
        client: &mut Client,
        of_image: &ImageConfig,
    ) -> Result<Vm> {
        let config = &self.config;
        let mut request = VmCreateRequest {
            name: Some(self.project.vm_name(own_uid()).parse()?),
            labels: Labels::new([(file::label_key(), self.project.label())])?,
            user: config.user.clone(),
            workdir: self.guest_dir.clone(),
            env: config.constants(&of_image.env),
            image: config.image.clone(),
            vcpus: config.cpus,
            mem_mib: config.memory_mib,
            disk_bytes: config.disk_bytes,
            ports: self.ports(false),
            auto_ports: published(self.publish).1,
            ..VmCreateRequest::default()
        };
        let _guard = self.interrupts.guard(client)?;
        let vm = loop {
            match client.call::<VmCreate>(&request) {
                // The repository chooses the ports, which may be in use on this host.
                Err(e) if e.is(Kind::PortTaken) && request.ports != self.ports(true) => {
                    printer.note(&format!("{e}; free ports are used instead"));
                    request.ports = self.ports(true);
                }
                // Another `fcctl up` has just created the VM, or another VM has the name.
                Err(e) if e.is(Kind::NameTaken) && request.name.is_some() => {
                    if let Some(vm) = find(client, self.project)? {
                        return Ok(vm);
                    }
                    request.name = None;
                }
                created => break created?.vm,
            }
        };
        printer.note(&format!("VM {}", vm.name));
        Ok(vm)
    }

    fn start(&self, printer: &mut Printer, client: &mut Client, vm: Vm) -> Result<Vm> {
        let request = VmRequest {
            vm: vm.id.to_string(),
        };
        let _guard = self.interrupts.guard(client)?;
        let doing = format!("start {}", vm.name);
        let mut vm = operate::<VmStart>(printer, client, &doing, &request)?.vm;
        if vm.paused {
            vm = client.call::<VmResume>(&request)?.vm;
        }
        Ok(vm)
    }

    fn copy(
        &self,
        printer: &mut Printer,
        client: &mut Client,
        vm: &Vm,
        (source, how): (Source, PrepareHow),
    ) -> Result<()> {
        Transfer {
            printer,
            interrupts: self.interrupts,
            client,
            vm: vm.name.as_str(),
        }
        .prepare(source, how)?;
        if self.interrupts.cause().is_some() {
            return Err(interrupted());
        }
        Ok(())
    }
}
