// How long a container's calls take through containerd's socket, of one snapshotter beside another.
package suite

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// BenchmarkCalls prepares a snapshot on a stack of five, asks for its mounts and removes it, of each of the
// SNAPSHOTTERS in turn. CONTAINERD is containerd's socket. Reported are medians and 99th percentiles.
func BenchmarkCalls(b *testing.B) {
	conn, err := grpc.NewClient("unix:"+os.Getenv("CONTAINERD"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	ctx := namespaces.WithNamespace(context.Background(), fmt.Sprintf("calls-%d-%d", os.Getpid(), b.N))
	// containerd's garbage collector would take them.
	keep := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "benchmark"})
	names := strings.Split(os.Getenv("SNAPSHOTTERS"), ",")
	took := make([][]float64, len(names))
	all := make([]snapshots.Snapshotter, len(names))
	for i, name := range names {
		all[i] = proxy.NewSnapshotter(api.NewSnapshotsClient(conn), name)
		parent := ""
		for layer := range 5 {
			name := fmt.Sprintf("layer-%d", layer)
			if _, err := all[i].Prepare(ctx, "unpack-"+name, parent, keep); err != nil {
				b.Fatal(err)
			}
			if err := all[i].Commit(ctx, name, "unpack-"+name, keep); err != nil {
				b.Fatal(err)
			}
			parent = name
		}
	}
	b.ResetTimer()
	for n := range b.N {
		for i, s := range all {
			key, begin := fmt.Sprintf("container-%d", n), time.Now()
			_, prepared := s.Prepare(ctx, key, "layer-4", keep)
			_, mounted := s.Mounts(ctx, key)
			removed := s.Remove(ctx, key)
			took[i] = append(took[i], float64(time.Since(begin).Microseconds()))
			if prepared != nil || mounted != nil || removed != nil {
				b.Fatal(names[i], prepared, mounted, removed)
			}
		}
	}
	for i, name := range names {
		slices.Sort(took[i])
		b.ReportMetric(took[i][len(took[i])/2], name+"-median-us")
		b.ReportMetric(took[i][len(took[i])*99/100], name+"-p99-us")
	}
}
