// soci15 makes AWS SOCI's published Go library a program that tests can run: its index builder, its
// converter and its snapshotter, whose own commands are not published as a Go module.
//
//	soci15 create  [-min-layer-size N] [-span-size N] [-push HOST/REPO]     LAYOUT:TAG
//	soci15 convert [-min-layer-size N] [-span-size N] [-push HOST/REPO:TAG] LAYOUT:TAG
//	soci15 serve   -config FILE -root DIR -address SOCKET
//
// create and convert read and write an OCI layout folder and print the descriptor of what they made as
// one line of JSON: the v1 index, or the image that carries a v2 index. Registries are spoken to in
// plain HTTP. serve ends on SIGTERM.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/awslabs/soci-snapshotter/config"
	"github.com/awslabs/soci-snapshotter/fs"
	"github.com/awslabs/soci-snapshotter/metadata"
	"github.com/awslabs/soci-snapshotter/service"
	"github.com/awslabs/soci-snapshotter/service/keychain/dockerconfig"
	"github.com/awslabs/soci-snapshotter/soci"
	"github.com/awslabs/soci-snapshotter/soci/store"
	snapshotsv1 "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/registry/remote"
)

var commands = map[string]func(context.Context, []string) error{
	"create":  create,
	"convert": convert,
	"serve":   serve,
}

var result = os.Stdout

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// The library prints its progress to stdout. Ours is for the result.
	os.Stdout = os.Stderr
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "soci15:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 || commands[args[0]] == nil {
		return errors.New("the first argument must be create, convert or serve")
	}
	return commands[args[0]](ctx, args[1:])
}

// job is one image in a layout folder and the settings it is indexed with.
type job struct {
	image        ocispec.Descriptor
	layout       *store.SociStore
	minLayerSize int64
	spanSize     int64
	push         string
	path         string
	tag          string
}

func parseJob(ctx context.Context, name string, args []string) (*job, error) {
	var j job
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.Int64Var(&j.minLayerSize, "min-layer-size", 10<<20, "layers below this many bytes get no zTOC")
	flags.Int64Var(&j.spanSize, "span-size", 4<<20, "distance of two checkpoints in uncompressed bytes")
	flags.StringVar(&j.push, "push", "", "repository (with a tag for convert) to push the result to")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	var found bool
	if j.path, j.tag, found = strings.Cut(flags.Arg(0), ":"); !found || flags.NArg() != 1 {
		return nil, fmt.Errorf("%s needs exactly one LAYOUT:TAG, after the flags", name)
	}
	var err error
	if j.layout, err = store.NewSociStore(j.path); err != nil {
		return nil, fmt.Errorf("open layout %s: %w", j.path, err)
	}
	if j.image, err = j.layout.Resolve(ctx, j.tag); err != nil {
		return nil, fmt.Errorf("find tag %s in %s: %w", j.tag, j.path, err)
	}
	return &j, nil
}

// withBuilder calls use with an index builder whose database of artifacts lives as long as the call: SOCI
// remembers there which layers it has indexed, and a test wants to see it work.
func (j *job) withBuilder(use func(*soci.IndexBuilder, images.Image) error) error {
	scratch, err := os.MkdirTemp("", "soci15")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	db, err := soci.NewDB(filepath.Join(scratch, "artifacts.db"))
	if err != nil {
		return err
	}
	blobs, err := local.NewStore(j.path)
	if err != nil {
		return err
	}
	builder, err := soci.NewIndexBuilder(blobs, j.layout,
		soci.WithArtifactsDb(db), soci.WithMinLayerSize(j.minLayerSize), soci.WithSpanSize(j.spanSize))
	if err != nil {
		return err
	}
	return use(builder, images.Image{Name: j.tag, Target: j.image})
}

func (j *job) repository() (*remote.Repository, error) {
	repo, err := remote.NewRepository(j.push)
	if err == nil {
		repo.PlainHTTP = true
	}
	return repo, err
}

func create(ctx context.Context, args []string) error {
	j, err := parseJob(ctx, "create", args)
	if err != nil {
		return err
	}
	return j.withBuilder(func(builder *soci.IndexBuilder, image images.Image) error {
		index, err := builder.Build(ctx, image)
		if err != nil {
			return err
		}
		if j.push == "" {
			return report(index.Desc)
		}
		repo, err := j.repository()
		if err != nil {
			return err
		}
		// The subject is the image, which the repository already has.
		own := oras.CopyGraphOptions{FindSuccessors: func(ctx context.Context, from content.Fetcher, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
			all, err := content.Successors(ctx, from, d)
			return slices.DeleteFunc(all, func(s ocispec.Descriptor) bool { return s.Digest == j.image.Digest }), err
		}}
		if err := oras.CopyGraph(ctx, j.layout, repo, index.Desc, own); err != nil {
			return fmt.Errorf("push to %s: %w", j.push, err)
		}
		return report(index.Desc)
	})
}

func convert(ctx context.Context, args []string) error {
	j, err := parseJob(ctx, "convert", args)
	if err != nil {
		return err
	}
	return j.withBuilder(func(builder *soci.IndexBuilder, image images.Image) error {
		converted, err := builder.Convert(ctx, image)
		if err != nil {
			return err
		}
		if j.push == "" {
			return report(*converted)
		}
		repo, err := j.repository()
		if err != nil {
			return err
		}
		if err := oras.CopyGraph(ctx, j.layout, repo, *converted, oras.DefaultCopyGraphOptions); err != nil {
			return fmt.Errorf("push to %s: %w", j.push, err)
		}
		if err := repo.Tag(ctx, *converted, repo.Reference.Reference); err != nil {
			return fmt.Errorf("tag %s: %w", j.push, err)
		}
		return report(*converted)
	})
}

func report(d ocispec.Descriptor) error {
	return json.NewEncoder(result).Encode(d)
}

func serve(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	file := flags.String("config", "", "the snapshotter's configuration, TOML")
	root := flags.String("root", "", "folder of the snapshotter")
	address := flags.String("address", "", "unix socket to listen on")
	if err := flags.Parse(args); err != nil {
		return err
	}
	settings, err := config.NewConfigFromToml(*file)
	if err != nil {
		return fmt.Errorf("read %s: %w", *file, err)
	}
	// Without a store of its own for file metadata the library crashes at the first lazy layer.
	files := metadata.NewMultiReader(filepath.Join(*root, "metadata"), metadata.DBMultiOptions{})
	snapshotter, err := service.NewSociSnapshotterService(ctx, *root, &settings.ServiceConfig,
		service.WithFilesystemOptions(fs.WithMetadataStore(files)),
		service.WithCredsFuncs(dockerconfig.NewDockerConfigKeychain(ctx)))
	if err != nil {
		return err
	}
	defer snapshotter.Close()
	listener, err := net.Listen("unix", *address)
	if err != nil {
		return err
	}
	// The parallel mode asks containerd for content, in the namespace that it is called in.
	server := grpc.NewServer(grpc.UnaryInterceptor(inNamespace))
	snapshotsv1.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	go func() {
		<-ctx.Done()
		server.Stop()
	}()
	return server.Serve(listener)
}

func inNamespace(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	if namespace, ok := namespaces.Namespace(ctx); ok {
		ctx = namespaces.WithNamespace(ctx, namespace)
	}
	return handle(ctx, request)
}
