//! The image of the demo, and the registry where it lies.

use std::path::Path;

use anyhow::{Context, Result};
use artifacts::{Image, ImageName, IndexStore, Origin};
use futures_util::{StreamExt, TryStreamExt, stream};
use testkit::registry::{Link, Options, Registry};
use ztoc::SpanOptions;

use super::pack;
use super::report::LinkFigures;
use super::stop::Stop;
use crate::args::{DemoArguments, GlobalArguments, RegistryArguments};
use crate::output::{Output, bytes};
use crate::run::Program;

/// Where the demo plays.
#[derive(Debug)]
pub(super) struct Scene {
    /// The image's reference.
    pub(super) image: String,
    common: GlobalArguments,
    /// Our own, unless the image is somebody else's.
    registry: Option<Registry>,
}

impl Scene {
    /// An image of a real registry.
    pub(super) fn of_image(common: &GlobalArguments, image: &str, work: &Path) -> Result<Self> {
        let image = crate::mount_commands::absolute_image(image)?;
        Ok(Self {
            image,
            common: GlobalArguments { root: work.join("node"), ..common.clone() },
            registry: None,
        })
    }

    /// Packs an image, pushes it and its index to a registry of our own, and shapes the link to that.
    pub(super) fn packed(
        common: &GlobalArguments,
        output: Output,
        arguments: &DemoArguments,
        stop: &Stop,
        work: &Path,
    ) -> Result<Self> {
        output.note(&format!(
            "packing an image of {} out of this machine's /usr",
            bytes(arguments.image_size)
        ));
        let image = pack::pack(work, arguments.image_size, stop)?;
        let registry = Registry::start(Options::default()).context("starting a registry")?;
        let pushed = image.push_to(&registry, "demo", "latest").context("pushing the image")?;
        let of_our_own = RegistryArguments {
            hosts_dir: work.join("no-hosts"),
            docker_config: Some(work.join("no-credentials.json")),
            platform: None,
        };
        let common =
            GlobalArguments { root: work.join("node"), registry: of_our_own, ..common.clone() };
        let scene = Self { image: pushed.reference, common, registry: Some(registry) };
        output.note("building its index and pushing it beside the unmodified image");
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let runtime = runtime.context("starting threads")?;
        runtime.block_on(stop.race(scene.push_index(&work.join("built"))))?;
        let link =
            Link { bandwidth_bits_per_s: Some(arguments.bandwidth), latency: arguments.latency };
        if let Some(registry) = &scene.registry {
            registry.set_link(link);
        }
        Ok(scene)
    }

    async fn push_index(&self, dir: &Path) -> Result<()> {
        let (origin, image) = self.resolve().await?;
        let indexes = IndexStore::open(dir)?;
        let ignore = |_bytes: u64| {};
        let (origin, indexes, ignore) = (&origin, &indexes, &ignore);
        let build = image.layers.iter().map(|layer| async move {
            let options = crate::stream::build_options(layer, SpanOptions::default());
            let built =
                crate::stream::index_layer(origin, layer, options, |_| Ok(()), ignore).await?;
            crate::stream::save(built, layer, indexes)?;
            Ok::<_, anyhow::Error>(())
        });
        stream::iter(build).buffered(2).try_collect::<Vec<()>>().await?;
        let start = crate::index_commands::start_ranges(origin, &image, indexes).await?;
        let pushed = artifacts::push_indexes(origin, &image, indexes, &start).await;
        pushed.context("pushing the index")?;
        Ok(())
    }

    /// Finds the image where it lies.
    pub(super) async fn resolve(&self) -> Result<(Origin, Image)> {
        let name: ImageName = self.image.parse()?;
        let client = crate::registries::client(&crate::registries::access(&self.common.registry)?);
        let origin = Origin::open(&name, &client)?;
        let platform = crate::daemon::platform(self.common.registry.platform.as_deref())?;
        let image = origin.resolve(&platform).await?;
        Ok((origin, image))
    }

    /// What commands on the demo's root folder are given.
    pub(super) fn common(&self) -> &GlobalArguments {
        &self.common
    }

    /// Whether the program is ours, and reads files when told to.
    pub(super) fn reads_by_itself(&self) -> bool {
        self.registry.is_some()
    }

    /// The program, told how many batches of reads there will be if it is ours.
    pub(super) fn prepare(&self, mut program: Program, batches: u32) -> Program {
        if self.reads_by_itself() {
            program.arguments.push(batches.to_string());
        }
        program
    }

    /// Bytes of blobs that our registry has sent since [`forget_traffic`](Self::forget_traffic).
    pub(super) fn traffic(&self) -> Option<u64> {
        self.registry.as_ref().map(Registry::bytes_sent)
    }

    /// Counts from here on.
    pub(super) fn forget_traffic(&self) {
        if let Some(registry) = &self.registry {
            registry.clear_requests();
        }
    }

    /// The link, where it is ours.
    pub(super) fn link(&self, arguments: &DemoArguments) -> Option<LinkFigures> {
        self.registry.as_ref().map(|_ours| LinkFigures {
            bandwidth_bits_per_s: arguments.bandwidth,
            latency_seconds: arguments.latency.as_secs_f64(),
        })
    }
}
