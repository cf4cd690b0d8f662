// containerd's own tests of snapshotters, against a daemon that serves them over a unix socket.
//
//	SNAPSHOTTER  a shell command that starts the daemon; $ROOT is an empty folder for it, and it must listen
//	             at $SOCKET. Each test gets a daemon of its own, which must end by SIGTERM.
package suite

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const patience = 20 * time.Second

// start runs the daemon and waits until its socket can be connected to.
func start(root, socket string) (*exec.Cmd, error) {
	daemon := exec.Command("/bin/sh", "-c", "exec "+os.Getenv("SNAPSHOTTER"))
	daemon.Env = append(os.Environ(), "ROOT="+root, "SOCKET="+socket)
	daemon.Stderr = os.Stderr
	if err := daemon.Start(); err != nil {
		return nil, err
	}
	for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			return daemon, conn.Close()
		}
		if time.Since(begin) > patience {
			return nil, errors.Join(fmt.Errorf("the daemon does not listen: %w", err), daemon.Process.Kill())
		}
	}
}

// stop ends the daemon as systemd would.
func stop(daemon *exec.Cmd) error {
	kill := time.AfterFunc(patience, func() { _ = daemon.Process.Kill() })
	defer kill.Stop()
	return errors.Join(daemon.Process.Signal(syscall.SIGTERM), daemon.Wait())
}

func connect(_ context.Context, dir string) (snapshots.Snapshotter, func() error, error) {
	root, socket := filepath.Join(dir, "root"), filepath.Join(dir, "socket")
	daemon, err := start(root, socket)
	if err != nil {
		return nil, nil, err
	}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, errors.Join(err, stop(daemon))
	}
	snapshotter := proxy.NewSnapshotter(api.NewSnapshotsClient(conn), "hermes")
	return snapshotter, func() error { return errors.Join(conn.Close(), stop(daemon)) }, nil
}

func TestSnapshotter(t *testing.T) {
	// Renaming a folder of a lower layer is not for overlayfs: the suite knows that by this name.
	testsuite.SnapshotterSuite(t, "overlayfs", connect)
}

// What containerd does next depends on the kind of an error, which its suite does not look at.
func TestErrorCodes(t *testing.T) {
	ctx := namespaces.WithNamespace(context.Background(), "testing")
	s, done, err := connect(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := done(); err != nil {
			t.Error(err)
		}
	})
	prepare := func(key, parent string) error { _, err := s.Prepare(ctx, key, parent); return err }
	view := func(key, parent string) error { _, err := s.View(ctx, key, parent); return err }
	mounts := func(key string) error { _, err := s.Mounts(ctx, key); return err }
	update := func(name, path string) error {
		_, err := s.Update(ctx, snapshots.Info{Name: name, Labels: map[string]string{"a": "b"}}, path)
		return err
	}
	walk := func(filter string) error {
		return s.Walk(ctx, func(context.Context, snapshots.Info) error { return nil }, filter)
	}
	stat := func(key string) error { _, err := s.Stat(ctx, key); return err }
	usage := func(key string) error { _, err := s.Usage(ctx, key); return err }
	none := func(err error) bool { return err == nil }
	// In this order: each line leaves what the next ones need.
	for _, step := range []struct {
		what string
		err  error
		is   func(error) bool
	}{
		{"stat of nothing", stat("none"), errdefs.IsNotFound},
		{"mounts of nothing", mounts("none"), errdefs.IsNotFound},
		{"usage of nothing", usage("none"), errdefs.IsNotFound},
		{"removal of nothing", s.Remove(ctx, "none"), errdefs.IsNotFound},
		{"commit of nothing", s.Commit(ctx, "name", "none"), errdefs.IsNotFound},
		{"change of nothing", update("none", "labels.a"), errdefs.IsNotFound},
		{"prepare on nothing", prepare("active", "none"), errdefs.IsNotFound},
		{"prepare", prepare("active", ""), none},
		{"prepare of a key in use", prepare("active", ""), errdefs.IsAlreadyExists},
		{"view of a key in use", view("active", ""), errdefs.IsAlreadyExists},
		{"prepare on an active one", prepare("child", "active"), errdefs.IsInvalidArgument},
		{"commit", s.Commit(ctx, "layer", "active"), none},
		{"mounts of a committed one", mounts("layer"), errdefs.IsFailedPrecondition},
		{"prepare on it", prepare("child", "layer"), none},
		{"commit to a name in use", s.Commit(ctx, "layer", "child"), errdefs.IsAlreadyExists},
		{"removal of a parent", s.Remove(ctx, "layer"), errdefs.IsFailedPrecondition},
		{"view", view("view", "layer"), none},
		{"prepare on a view", prepare("other", "view"), errdefs.IsInvalidArgument},
		{"commit of a view", s.Commit(ctx, "name", "view"), errdefs.IsFailedPrecondition},
		{"commit of a committed one", s.Commit(ctx, "name", "layer"), errdefs.IsFailedPrecondition},
		{"change of a label", update("layer", "labels.a"), none},
		{"change of a kind", update("layer", "kind"), errdefs.IsInvalidArgument},
		{"a filter", walk(`labels."a"==b`), none},
		{"no filter", walk("=="), errdefs.IsInvalidArgument},
		{"cleaning up", s.(snapshots.Cleaner).Cleanup(ctx), none},
	} {
		if !step.is(step.err) {
			t.Errorf("%s: %v", step.what, step.err)
		}
	}
}
