//! Layers as files of one FUSE mount, with a loop device over each: what EROFS reads where the
//! kernel has no pre-content events.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use causes::in_full;
use fill::{Gate, Layer};
use fuse::{
    BytesThen, Connection, Errno, Ino, LayerFile, LayersFs, Negotiated, Session, SessionOptions,
};
use oci::Digest;
use parking_lot::{Mutex, RwLock};
use sys::fanotify::FileId;
use sys::loop_device::{Access, AttachError, Caching, LoopDevice, LoopOptions, OnLastClose};

use crate::error::BackendError;
use crate::front_ends::{fuse_options, raise_read_ahead};
use crate::holding::Holding;

/// The served folder and the loop devices over its files.
pub(crate) struct Served {
    dir: PathBuf,
    fs: Arc<LayersFs>,
    files: Arc<Files>,
    /// A connection that is not served yet.
    waiting: Option<(Connection, Option<Negotiated>)>,
    session: Option<Session>,
    /// The device number of the served folder.
    device: u64,
    devices: Mutex<HashMap<Digest, Device>>,
}

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Served").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// One layer's loop device.
#[derive(Debug)]
struct Device {
    path: PathBuf,
    users: usize,
    /// Keeps the device until EROFS has it: one that nobody has open goes at once.
    opened: Option<LoopDevice>,
}

/// The layers behind the files, by the numbers that the file system has for them.
#[derive(Default)]
struct Files(RwLock<HashMap<u32, Arc<Layer>>>);

impl Files {
    /// Adds a layer under a number that is free.
    fn insert(&self, layer: &Arc<Layer>) -> u32 {
        let mut files = self.0.write();
        let free = (0..).find(|number| !files.contains_key(number)).unwrap_or_default();
        files.insert(free, Arc::clone(layer));
        free
    }
}

impl fuse::Bytes for Files {
    fn read(&self, layer: u32, range: Range<u64>, then: BytesThen) {
        let layer = self.0.read().get(&layer).cloned();
        match layer {
            Some(layer) => crate::bytes::read(&layer, range, then),
            None => then(Err(Errno::IO)),
        }
    }
}

impl Served {
    /// Mounts on `dir` and serves.
    pub(crate) fn mount(dir: &Path, holding: &Holding) -> Result<Self, BackendError> {
        fs::create_dir_all(dir).map_err(|source| BackendError::io("making", dir, source))?;
        let options = fuse_options("hermes-layers", fuse::Access::Everybody);
        let connection = Connection::mount(dir, &options)?;
        let mut served = Self::over(dir, connection, None)?;
        served.begin()?;
        if let Some(session) = &served.session {
            let note = session.negotiated().to_bytes();
            holding.put(SERVED, &note, session.connection().as_fd())?;
        }
        raise_read_ahead(dir);
        Ok(served)
    }

    /// Takes over a predecessor's connection, if there is one. Its readers wait until
    /// [`begin`](Self::begin), which is for when all its layers are [adopted](Self::adopt): the kernel
    /// sends again what was not answered, and a file that is not there yet would be an error.
    pub(crate) fn resume(dir: &Path, holding: &Holding) -> Option<Self> {
        let (note, fd) = holding.get(SERVED)?;
        let resumed = Connection::from_fd(fd)
            .map_err(BackendError::from)
            .and_then(|connection| Self::over(dir, connection, Negotiated::from_bytes(&note)));
        resumed
            .inspect_err(|err| {
                let error = in_full(err);
                tracing::error!(dir = %dir.display(), error, "served layers cannot be taken over; their readers wait");
            })
            .ok()
    }

    fn over(
        dir: &Path,
        connection: Connection,
        note: Option<Negotiated>,
    ) -> Result<Self, BackendError> {
        let files = Arc::new(Files::default());
        let fs = Arc::new(LayersFs::new(Arc::clone(&files) as Arc<dyn fuse::Bytes>));
        // Nobody may be there to answer a `stat`; the device number is known without.
        let device = sys::mount::location(dir)
            .map_err(|source| BackendError::io("looking at", dir, source))?
            .device;
        Ok(Self {
            dir: dir.to_owned(),
            fs,
            files,
            waiting: Some((connection, note)),
            session: None,
            device: rustix::fs::makedev(device.major, device.minor),
            devices: Mutex::default(),
        })
    }

    /// Begins to answer.
    pub(crate) fn begin(&mut self) -> Result<(), BackendError> {
        if let Some((connection, negotiated)) = self.waiting.take() {
            let fs = Arc::clone(&self.fs) as Arc<dyn fuse::Filesystem>;
            let options = SessionOptions { threads: THREADS, negotiated };
            self.session = Some(Session::start(connection, fs, &options)?);
        }
        Ok(())
    }

    /// A loop device over `layer`, made if there is none. Each call needs one
    /// [`release`](Self::release).
    pub(crate) fn attach(&self, layer: &Arc<Layer>) -> Result<PathBuf, BackendError> {
        let mut devices = self.devices.lock();
        if let Some(device) = devices.get_mut(layer.digest()) {
            device.users += 1;
            return Ok(device.path.clone());
        }
        let (name, size) = self.serve(layer)?;
        let path = self.dir.join(name);
        let file =
            File::open(&path).map_err(|source| BackendError::io("opening", &path, source))?;
        // Through the page cache of the served file one missing block would hold up every other read.
        let direct = LoopOptions { caching: Caching::Direct, ..options(size) };
        let device = LoopDevice::attach(file.as_fd(), direct)?;
        device.set_read_ahead(READ_AHEAD_KIB).ok();
        let path = device.path().to_owned();
        let opened = Some(device);
        devices.insert(*layer.digest(), Device { path: path.clone(), users: 1, opened });
        Ok(path)
    }

    /// After a restart: serves `layer` again under the device that a predecessor made, if it still
    /// exists.
    pub(crate) fn adopt(&self, layer: &Arc<Layer>, path: &Path) -> Result<(), BackendError> {
        let mut devices = self.devices.lock();
        if let Some(device) = devices.get_mut(layer.digest()) {
            device.users += 1;
            return Ok(());
        }
        self.serve(layer)?;
        let device = Device { path: path.to_owned(), users: 1, opened: None };
        devices.insert(*layer.digest(), device);
        Ok(())
    }

    /// After the mount: while the layer is sealed, its real file is under the device.
    pub(crate) fn mounted(&self, layer: &Arc<Layer>) {
        let (path, opened) = match self.devices.lock().get_mut(layer.digest()) {
            Some(device) => (device.path.clone(), device.opened.take()),
            None => return,
        };
        if let Some(opened) = opened {
            opened.into_persistent();
        }
        layer.add_gate(Arc::new(Swap {
            layer: Arc::downgrade(layer),
            device: path,
            served: self.file_id(layer),
            path: self.dir.join(layer.digest().hex()),
        }));
    }

    /// One mount less uses the layer. The device goes with its last mount.
    pub(crate) fn release(&self, layer: &Layer) {
        let mut devices = self.devices.lock();
        if let Some(device) = devices.get_mut(layer.digest()) {
            device.users -= 1;
            if device.users == 0 {
                devices.remove(layer.digest());
                self.fs.remove(ino(layer));
                self.files.0.write().retain(|_, served| served.digest() != layer.digest());
            }
        }
    }

    /// Ends the mount of the served folder; loop devices that are in use keep it alive.
    pub(crate) fn unmount(self, holding: &Holding) {
        let Self { dir, session, .. } = self;
        if let Err(err) = sys::mount::unmount(&dir, sys::mount::Unmount::Detach) {
            tracing::warn!(dir = %dir.display(), error = %err, "served layers stay mounted");
        }
        drop(session);
        holding.remove(SERVED);
    }

    /// Whether any layer is served.
    pub(crate) fn is_idle(&self) -> bool {
        self.devices.lock().is_empty()
    }

    fn serve(&self, layer: &Arc<Layer>) -> Result<(String, u64), BackendError> {
        let (len, size) = (layer.bytes(), layer.bytes().next_multiple_of(512));
        let name = layer.digest().hex();
        let number = self.files.insert(layer);
        let file = LayerFile {
            ino: ino(layer),
            name: name.clone().into_bytes(),
            layer: number,
            len,
            size,
        };
        self.fs.add(file)?;
        Ok((name, size))
    }

    fn file_id(&self, layer: &Layer) -> FileId {
        FileId { dev: self.device, ino: ino(layer).0 }
    }
}

/// The inode number of a layer's file: the same for every daemon, so that the kernel's pages stay
/// valid. [`LayersFs::add`] refuses two layers with the same one.
fn ino(layer: &Layer) -> Ino {
    let [a, b, c, d, e, f, g, h, ..] = *layer.digest().as_bytes();
    Ino((u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 1) | 2)
}

/// Puts the real file of a whole layer under its loop device, and the served one when it is opened again.
struct Swap {
    layer: Weak<Layer>,
    device: PathBuf,
    /// The file that we serve; if neither that nor the real one is under the device, so is another
    /// device by now.
    served: FileId,
    /// Where we serve it.
    path: PathBuf,
}

impl Gate for Swap {
    fn sealed(&self) {
        let Some(layer) = self.layer.upgrade() else { return };
        if let Err(err) = self.show_real(&layer) {
            // Reads go on through us, as before.
            tracing::warn!(layer = %layer.digest(), device = %self.device.display(), error = %err, "sealed layer stays served");
        }
    }

    fn reopened(&self) -> io::Result<()> {
        let Some(layer) = self.layer.upgrade() else { return Ok(()) };
        let device = match LoopDevice::open(&self.device) {
            Ok(device) => device,
            Err(AttachError::Unavailable { source: Errno::NOENT, .. }) => return Ok(()),
            Err(err) => return Err(io::Error::other(err)),
        };
        let below = match device.status() {
            Ok(status) => status.file,
            Err(err) if err.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => return Ok(()),
            Err(err) => return Err(err),
        };
        if below != FileId::of(layer.data().as_fd())? {
            return Ok(());
        }
        // The kernel waits for reads of the real file that are under way.
        device.change_fd(File::open(&self.path)?.as_fd())?;
        // The real file may have been one that cannot do without its page cache.
        if let Err(err) = device.set_caching(Caching::Direct) {
            tracing::debug!(device = %self.device.display(), error = %err, "served layer is cached");
        }
        Ok(())
    }
}

impl Swap {
    fn show_real(&self, layer: &Layer) -> io::Result<()> {
        let device = LoopDevice::open(&self.device).map_err(io::Error::other)?;
        if device.status()?.file != self.served {
            return Ok(());
        }
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(layer.data()));
        device.change_fd(File::open(path)?.as_fd())
    }
}

/// How a layer's file, or an image's metadata, is shown as a device that goes with its last mount.
pub(crate) fn options(size: u64) -> LoopOptions {
    LoopOptions {
        access: Access::ReadOnly,
        block_size: 512,
        size_limit: Some(size.next_multiple_of(512)),
        on_last_close: OnLastClose::Detach,
        ..LoopOptions::default()
    }
}

/// What the keeper calls the connection.
pub(crate) const SERVED: &str = "served";

const THREADS: usize = 2;
const READ_AHEAD_KIB: u32 = 512;
