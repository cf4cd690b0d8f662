#!/bin/bash
# Makes the images that are started, inside a test node with the host's network: build.sh LAYOUT
#
# Seven images as their users make them: Debian, then packages, then the application, a gzip layer each.
# This file is the whole recipe: the cache is keyed by its content.
set -euo pipefail
layout=$1
# The mirror that the node itself was made from.
mirror=$(awk '$1 == "deb" { print $2; exit }' /etc/apt/sources.list)
cd /srv
export DEBIAN_FRONTEND=noninteractive

apt-get -qq update
apt-get -qq install --yes --no-install-recommends -o Dpkg::Use-Pty=0 mmdebstrap util-linux-extra
# For needed.sh, which has no network.
cp /usr/bin/fincore "${layout%/*}/"
# What a Debian base image leaves out.
slim=(--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright'
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*')
mmdebstrap --quiet --mode=root --variant=minbase "${slim[@]}" \
  --aptopt='Acquire::Check-Valid-Until "false";' --customize-hook='rm -rf "$1"/var/lib/apt/lists/*' bookworm base.tar "$mirror"

umoci init --layout "$layout"
umoci new --image "$layout:base"
umoci raw add-layer --image "$layout:base" base.tar
rm base.tar

begin() { # the image NAME on the base
  name=$1
  umoci tag --image "$layout:base" "$name"
  umoci unpack --image "$layout:$name" work
}
# Runs lines of bash in the image, with the host's way to the network.
inside() {
  cp /etc/ssl/certs/ca-certificates.crt work/rootfs/tmp/host-certificates
  cp /etc/resolv.conf work/rootfs/etc/resolv.conf
  mount -t proc proc work/rootfs/proc
  chroot work/rootfs env "${network[@]}" PIP_CERT=/tmp/host-certificates bash -euc "$1"
  umount work/rootfs/proc
  rm work/rootfs/tmp/host-certificates
}
layer() { umoci repack --refresh-bundle --image "$layout:$name" work; }
finish() { umoci config --image "$layout:$name" "$@"; rm -rf work; }
network=()
for setting in http_proxy https_proxy no_proxy PIP_INDEX_URL MAVEN_OPTS; do
  [ -z "${!setting:-}" ] || network+=("$setting=${!setting}")
done
install='apt-get -qq update && apt-get -qq install --yes --no-install-recommends -o Dpkg::Use-Pty=0'
clean='apt-get clean; rm -rf /var/lib/apt/lists/*'

# A web server with a site of 50 MB.
begin web
inside "$install nginx; $clean"
layer
inside "rm /etc/dpkg/dpkg.cfg.d/*; $install debian-handbook; $clean
mkdir /var/www/handbook
for language in de-DE el-GR en-US fr-FR ja-JP pl-PL zh-CN; do
  cp -rL /usr/share/doc/debian-handbook/html/\$language /var/www/handbook/
done
apt-get -qq purge --yes --autoremove debian-handbook"
cat > work/rootfs/etc/nginx/nginx.conf <<'END'
daemon off;
worker_processes 2;
pid /run/nginx.pid;
error_log stderr;
events { worker_connections 512; }
http {
  include mime.types;
  access_log off;
  sendfile on;
  server { listen 8080; root /var/www/handbook; index index.html; }
}
END
layer
finish --config.entrypoint /usr/sbin/nginx

# Python services: they import what a data scientist imports, fit nothing, and answer a prediction.
cat > predict.py <<'END'
"""Answers with a prediction of a small model."""
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

rng = np.random.default_rng(7)
table = pd.DataFrame(rng.normal(size=(400, 6)), columns=list("abcdef"))
wanted = (table.a + table.b * table.c > 0).astype(int)
train, test, train_wanted, _ = train_test_split(table, wanted, random_state=0)
model = make_pipeline(StandardScaler(), RandomForestClassifier(n_estimators=10, random_state=0))
model.fit(train, train_wanted)


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{model.predict(test[:1])[0]}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


HTTPServer(("", 8080), Answer).serve_forever()
END
pip='pip install --quiet --no-cache-dir --break-system-packages --root-user-action ignore'
wheels='numpy==1.26.4 pandas==2.2.3 scikit-learn==1.5.2 scipy==1.14.1'
serve() {
  mkdir work/rootfs/app
  cp predict.py work/rootfs/app/serve.py
  layer
  finish --config.entrypoint /usr/bin/python3 --config.entrypoint /app/serve.py
}

# One as many have it, with pip and more than it uses.
begin python
inside "$install python3 python3-pip; $clean"
layer
inside "$pip $wheels matplotlib==3.9.2"
layer
serve

# One with what it needs.
begin sklearn
inside "$install python3; $clean"
layer
inside "$install python3-pip; $pip $wheels; apt-get -qq purge --yes --autoremove python3-pip; $clean"
layer
serve

# A JVM with a servlet container; the page that is asked for is a JSP, which it must compile.
begin jvm
inside "mkdir -p /usr/share/man/man1; $install openjdk-17-jdk-headless; $clean"
layer
inside "$install tomcat10 tomcat10-examples; $clean
mkdir -p /srv/tomcat/{conf,logs,temp,webapps,work}
cp -r /etc/tomcat10/* /srv/tomcat/conf/
rm -rf /srv/tomcat/conf/Catalina
cp -rL /usr/share/tomcat10-examples/examples /srv/tomcat/webapps/examples"
layer
mkdir -p work/rootfs/srv/tomcat/webapps/ROOT
printf '<%%@ page import="java.time.*" %%><html><body>${1 + 2} at <%%= Instant.now() %%></body></html>\n' \
  > work/rootfs/srv/tomcat/webapps/ROOT/index.jsp
layer
finish --config.env JAVA_HOME=/usr/lib/jvm/java-17-openjdk-amd64 --config.env CATALINA_HOME=/usr/share/tomcat10 \
  --config.env CATALINA_BASE=/srv/tomcat --config.env PATH=/usr/bin:/bin \
  --config.entrypoint /usr/share/tomcat10/bin/catalina.sh --config.entrypoint run

# A Spring Boot service on a JRE, built in an image of its own as by a Dockerfile's first stage. It counts its visits in
# a database.
begin builder
mkdir -p work/rootfs/service/src/main/java/service
cat > work/rootfs/service/pom.xml <<'END'
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <parent>
    <groupId>org.springframework.boot</groupId>
    <artifactId>spring-boot-starter-parent</artifactId>
    <version>3.3.5</version>
    <relativePath/>
  </parent>
  <groupId>service</groupId>
  <artifactId>service</artifactId>
  <version>1</version>
  <properties><java.version>17</java.version></properties>
  <dependencies>
    <dependency><groupId>org.springframework.boot</groupId><artifactId>spring-boot-starter-web</artifactId></dependency>
    <dependency><groupId>org.springframework.boot</groupId><artifactId>spring-boot-starter-actuator</artifactId></dependency>
    <dependency><groupId>org.springframework.boot</groupId><artifactId>spring-boot-starter-data-jpa</artifactId></dependency>
    <dependency><groupId>com.h2database</groupId><artifactId>h2</artifactId></dependency>
  </dependencies>
  <build><plugins><plugin>
    <groupId>org.springframework.boot</groupId><artifactId>spring-boot-maven-plugin</artifactId>
  </plugin></plugins></build>
</project>
END
cat > work/rootfs/service/src/main/java/service/Service.java <<'END'
package service;

import jakarta.persistence.Entity;
import jakarta.persistence.GeneratedValue;
import jakarta.persistence.Id;
import org.springframework.boot.SpringApplication;
import org.springframework.boot.autoconfigure.SpringBootApplication;
import org.springframework.data.jpa.repository.JpaRepository;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.RestController;

@SpringBootApplication
public class Service {
  public static void main(String[] arguments) {
    SpringApplication.run(Service.class, arguments);
  }
}

@Entity
class Visit {
  @Id
  @GeneratedValue
  Long id;
}

interface Visits extends JpaRepository<Visit, Long> {}

@RestController
class Counter {
  private final Visits visits;

  Counter(Visits visits) {
    this.visits = visits;
  }

  @GetMapping("/")
  long count() {
    visits.save(new Visit());
    return visits.count();
  }
}
END
# Maven trusts whom the host trusts.
inside "mkdir -p /usr/share/man/man1; $install maven openjdk-17-jdk-headless
cd /service
csplit --quiet --elide-empty-files --prefix host- /tmp/host-certificates '/BEGIN CERTIFICATE/' '{*}'
printf '+%s\n' host-* | java -jar /usr/share/ca-certificates-java/ca-certificates-java.jar -storepass changeit > /dev/null
mvn --quiet --batch-mode package"
mv work/rootfs/service/target/service-1.jar service.jar
rm -rf work
umoci rm --image "$layout:builder"
begin spring
inside "mkdir -p /usr/share/man/man1; $install openjdk-17-jre-headless; $clean"
layer
mkdir work/rootfs/app
mv service.jar work/rootfs/app/
layer
finish --config.entrypoint /usr/bin/java --config.entrypoint -jar --config.entrypoint /app/service.jar

# A database: a new cluster, as in the first start of a volume, and a query.
begin postgres
inside "$install postgresql-15; rm -rf /var/lib/postgresql/15; $clean"
layer
mkdir -p work/rootfs/usr/local/bin
cat > work/rootfs/usr/local/bin/start-database <<'END'
#!/bin/sh
set -eu
export PATH=/usr/lib/postgresql/15/bin:/usr/bin:/bin PGDATA=/var/lib/postgresql/data
initdb --no-sync --auth=trust --username=postgres > /dev/null
exec postgres -p 8080 -k /tmp -c listen_addresses=127.0.0.1
END
chmod +x work/rootfs/usr/local/bin/start-database
layer
finish --config.user postgres --config.entrypoint /usr/local/bin/start-database

# What serves a model: PyTorch with CUDA's libraries, several GB. It answers with what a network makes of noise.
begin pytorch
inside "$install python3 python3-pip; $clean"
layer
inside "$pip torch==2.5.1 numpy==1.26.4"
layer
mkdir work/rootfs/app
cat > work/rootfs/app/serve.py <<'END'
"""Answers with the largest of ten numbers that a network makes of noise."""
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
from torch import nn

torch.manual_seed(7)
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(1024, 10)).eval()


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        with torch.inference_mode():
            body = f"{model(torch.randn(1, 3, 64, 64)).argmax().item()}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


HTTPServer(("", 8080), Answer).serve_forever()
END
layer
finish --config.entrypoint /usr/bin/python3 --config.entrypoint /app/serve.py

umoci gc --layout "$layout"
